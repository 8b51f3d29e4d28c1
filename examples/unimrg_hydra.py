"""UniMRG for a trained HYDRA in Python: other weights of the four losses, adapters, the merged model pushed to the Hub.

python examples/unimrg_hydra.py --init runs/hydra/final --annotations llava.json --images images --targets targets \\
    --lora_rank 16 --out runs/unimrg --push_to_hub me/hydra-unimrg

`hydra prepare unimrg --images llava.json --image_root images --out targets` makes the targets. Under `torchrun` or `accelerate launch` it
trains on all processes; the same command resumes a killed run. Without `--init` the embedded model is trained on the toy world.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hydra_hf import HydraPipeline
from hydra_hf.data.sources import Source
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipe import HydraRecipe
from hydra_hf.training.recipes import tiny, unimrg


TASK_WEIGHTS = {"understand": 1.0, "reconstruct": 1.0, "depth": 1.0, "segment": 1.0}  # the paper's


def create_recipe(options: argparse.Namespace) -> HydraRecipe:
    changes = {"task_weights": TASK_WEIGHTS}
    changes |= {"lora_rank": options.lora_rank} if options.lora_rank else {}
    changes |= {"num_steps": options.num_steps} if options.num_steps else {}
    if options.init is None:
        return tiny.unimrg().with_overrides(**changes)
    records = {"path": str(options.annotations), "image_root": str(options.images)}
    sources = (
        Source(task="understand", **records),
        Source(task="reconstruct", **records),
        Source(task="depth", **records, targets=str(options.targets / "depth")),
        Source(task="segment", **records, targets=str(options.targets / "segment")),
    )
    recipe = unimrg.hydra_1_5b(options.init).with_overrides(**changes)
    return replace(recipe, data=sources, micro_batch_size=options.micro_batch_size)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--init", help="folder or Hub id of a trained HYDRA; without it, the embedded model and the toy world"
    )
    parser.add_argument("--annotations", type=Path, help="JSON in LLaVA's format")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--targets", type=Path, help="folder that `hydra prepare unimrg` made")
    parser.add_argument("--lora_rank", type=int, default=0, help="0 trains in full")
    parser.add_argument("--num_steps", type=int, help="instead of the recipe's")
    parser.add_argument("--micro_batch_size", type=int, help="samples in memory at once")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME")
    options = parser.parse_args(arguments)
    if options.init and not (options.annotations and options.images and options.targets):
        parser.error("--init needs --annotations, --images and --targets")
    final = train_hydra(create_recipe(options), options.out, on_stage=print)  # adapters are merged in it
    print(final)
    if options.push_to_hub:
        HydraPipeline.from_pretrained(final).push_to_hub(options.push_to_hub)


if __name__ == "__main__":
    main()
