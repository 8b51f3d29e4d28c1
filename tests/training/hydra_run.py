"""A run of HYDRA's trainer on the toy world, for tests that start several processes: hydra_run.py FOLDER RUN..."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from hydra_hf.data.sources import Source, Sources
from hydra_hf.toy.batches import ToyData
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipe import HydraRecipe, HydraStage
from toy_models import toy_config, toy_pipeline, toy_processor


EVERYTHING = ("vision_head", "model.vision_tower.sem_vit", "model.multi_modal_projector", "model.time_embedding",
              "model.language_model")  # fmt: skip
STAGE = HydraStage(
    name="stage1",
    data=ToyData(),
    num_steps=3,
    learning_rates=dict.fromkeys(EVERYTHING, 3e-5),  # Adam makes a step of the rate of every rounding error
    tasks={"understand": 2, "generate": 3},
    warmup_steps=1,
    decay_share=0.0,
    mixed_precision="no",
)
RUNS = {  # name -> tasks, what differs in the recipe
    "even": ({"understand": 2, "generate": 4}, {}),
    "accumulated": ({"understand": 3, "generate": 4}, {"micro_batch_size": 2}),
    "lacking": ({"understand": 1, "generate": 2}, {}),  # the second process has no question
    "painting": ({"understand": 2, "reconstruct": 2, "depth": 1, "segment": 3}, {}),  # UniMRG
    "dialogues": ({"interleave": 2}, {}),  # in a step, one process may draw and the other not
    "packed": ({"understand": 3, "generate": 4}, {"max_length": 80, "micro_batch_tokens": 160}),
}


def recipe(folder: Path, tasks: dict[str, int], **stage_changes) -> HydraRecipe:
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        toy_pipeline().model.model.vision_tower.save_pretrained(tokenizer)
    return HydraRecipe(
        name="test", config=toy_config(), stages=(replace(STAGE, tasks=tasks, **stage_changes),), log_every=1,
        save_every=100, sample_every=100, tokenizer=str(tokenizer), processor=toy_processor(),
        sample_prompts=("a cat", "a dog", "two red circles"),
    )  # fmt: skip


def dialogues(folder: Path) -> Sources:
    """Four dialogues of two drawn pictures, a colour and its opposite, as a data set for the task `interleave`."""
    path, rows = folder / "dialogues.jsonl", []
    for number, color in enumerate(("red", "green", "blue", "yellow")):
        picture = Image.new("RGB", (64, 64), color)
        for name, shown in (("it", picture), ("opposite", ImageOps.invert(picture))):
            shown.save(folder / f"{name}{number}.png")
        turns = [("user", f"draw {color}"), ("assistant", f"{color} <image>"), ("user", "the opposite"),
                 ("assistant", f"not {color} <image> it was {color}")]  # fmt: skip
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"messages": messages, "images": [f"it{number}.png", f"opposite{number}.png"]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return Sources((Source(task="interleave", path=str(path)),))


def run(folder: Path, name: str, output_dir: Path) -> None:
    tasks, changes = RUNS[name]
    data = {"data": dialogues(folder)} if "interleave" in tasks else {}
    train_hydra(replace(recipe(folder, tasks, **data), **changes), output_dir, only="stage1")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        run(folder, name, folder / f"{name}-many")
