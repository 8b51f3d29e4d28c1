"""Makes docs/tables/prices.md: what the stages of the recipes cost, by `hydra train RECIPE --dry_run`.

python examples/recipe_prices.py [RECIPE ...]
"""

import argparse
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from hydra_hf.cli import main as hydra


PAGE = Path(__file__).parents[1] / "docs" / "tables" / "prices.md"
EIGHT = "--num_processes 8 --dry_run"
COMMANDS = (
    f"hydra train hydra_tok.internvit_300m --init init-tok --micro_batch_size 8 --gradient_checkpointing {EIGHT}",
    "hydra train hydra_x_tok.siglip2_so400m --init init-xtok --teacher google/siglip2-so400m-patch16-naflex"
    f" --video_teacher facebook/vjepa2-vitl-fpc64-256 --micro_batch_size 4 --gradient_checkpointing {EIGHT}",
    f"hydra train hydra.hydra_1_5b --micro_batch_size 8 {EIGHT}",
    f"hydra train hydra.hydra_7b --micro_batch_size 8 {EIGHT}",
    f"hydra train hydra_x.hydra_x_1_5b --micro_batch_size 8 {EIGHT}",
    f"hydra train hydra_x.hydra_x_7b --micro_batch_size 8 {EIGHT}",
    f"hydra train unimrg.hydra_1_5b --micro_batch_size 16 {EIGHT}",
    f"hydra train unimrg.hydra_7b --micro_batch_size 16 {EIGHT}",
    "hydra train tiny.tokenizer --dry_run",
    "hydra train tiny.unimrg --dry_run",
    "hydra train tiny_x.tokenizer --dry_run",
)
FLOPS_PER_HOUR = 0.4 * 989e12 * 3600  # of an H100 in bf16 (989e12 a second), at 40 % of them
HEADER = """| recipe | stage | steps | trained parameters | FLOPs of a step | FLOPs of the stage | H100 hours | GiB of a process | sharded |
|---|---|---|---|---|---|---|---|---|
"""


def price(command: str) -> str:
    """What the command prints."""
    with redirect_stdout(io.StringIO()) as printed:
        if code := hydra(shlex.split(command)[1:]):
            raise RuntimeError(f"{command} ended with exit code {code}.")
    return printed.getvalue().strip()


def rows(command: str, printed: str) -> str:
    """A row of the table for each stage of a dry run."""
    recipe, text = shlex.split(command)[2], ""
    for stage in printed.split("\n\n"):
        name, steps = re.match(r"(\w+): ([\d,]+) steps", stage).groups()
        step, total = re.search(r"a step: (\S+) FLOPs; the stage: (\S+)", stage).groups()
        (trained,) = re.search(r"\n  parameters: .*trained ([\d,]+)", stage).groups()
        (memory,) = re.search(r"memory of one process: ([\d.]+) GiB", stage).groups()
        sharded = re.search(r"sharded: ([\d.]+) GiB", stage)
        hours = float(total) / FLOPS_PER_HOUR
        text += (
            f"| `{recipe}` | {name} | {steps} | {trained} | {step} | {total} | {f'{hours:,.0f}' if hours >= 1 else '< 1'} |"
            f" {memory} | {sharded[1] if sharded else ''} |\n"
        )
    return text


def page(outputs: dict[str, str]) -> str:
    """The table of all commands, then what they printed."""
    table = HEADER + "".join(rows(command, printed) for command, printed in outputs.items())
    if missing := [shlex.split(command)[2] for command in COMMANDS if command not in outputs]:
        table += f"\nNot run yet: {', '.join(f'`{recipe}`' for recipe in missing)}.\n"
    blocks = "".join(f"\n```text\n$ {command}\n{printed}\n```\n" for command, printed in outputs.items())
    return f"{table}\n## What the dry runs print\n{blocks}"


def read(path: Path) -> dict[str, str]:
    """The commands of a page that `page` made, with what they printed."""
    if not path.is_file():
        return {}
    return dict(re.findall(r"```text\n\$ (.*?)\n(.*?)\n```", path.read_text(encoding="utf-8"), flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="those to price again; the others stay as they are in the page")
    recipes, outputs = parser.parse_args().recipes, read(PAGE)
    PAGE.parent.mkdir(exist_ok=True)
    for command in COMMANDS:
        if not recipes or shlex.split(command)[2] in recipes:
            outputs[command] = price(command)
            known = {command: outputs[command] for command in COMMANDS if command in outputs}
            PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main()
