"""Both trainers in bf16 under FSDP2 or DeepSpeed on CPUs, where accelerate knows neither: sharded_run.py FOLDER JUDGES.

Which one is in the environment, as `accelerate launch` sets it from the files of examples/accelerate.
"""

import os
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import hydra_run
import vision_tower_run
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from hydra_hf.toy.batches import ToyData
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.processes import partial_state
from hydra_hf.training.recipe import HydraLossWeights
from hydra_hf.training.recipes import tiny
from toy_models import toy_video_pipeline


STAGE = {"mixed_precision": "bf16", "ema_decay": 0.0, "muon_scale": 0.0, "decay_share": 0.0}


def shard_on_cpus() -> None:
    """Only on GPUs does accelerate look at these variables; they are all that this adds."""
    init = AcceleratorState.__init__
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend = import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # it compiles for minutes; messages then go through gloo

    def init_sharded(self, *args, **kwargs):
        is_new = "_mixed_precision" not in AcceleratorState._shared_state
        init(self, *args, **kwargs)
        if is_new and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
        elif is_new and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            self.deepspeed_plugins = kwargs["deepspeed_plugin"]
            self.deepspeed_plugins.set_mixed_precision(self._mixed_precision)
            self.deepspeed_plugins.select(_from_accelerator_state=True)
            self.distributed_type, self._mixed_precision = DistributedType.DEEPSPEED, "no"
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init_sharded


def train_vision_tower(folder: Path, judges: Path) -> None:
    """Three steps; and two, which a second trainer resumes."""
    stage = vision_tower_run.make_stage(judges, **STAGE)
    interrupted = vision_tower_run.make_trainer(folder / "resumed", stage)
    for _ in range(2):
        interrupted.train_step()
        interrupted.step += 1
    interrupted.save_checkpoint()
    for name in ("whole", "resumed"):
        trainer = vision_tower_run.make_trainer(folder / name, stage)
        model = trainer.train()
        if trainer.accelerator.is_main_process:
            model.save_pretrained(folder / name / "final")
        trainer.accelerator.wait_for_everyone()


def train_language_model(folder: Path) -> None:
    """Three steps; and from the checkpoint after the second one again."""
    with partial_state().main_process_first():  # which writes a tokenizer
        recipe = hydra_run.recipe(folder, hydra_run.RUNS["even"][0], **STAGE)
    recipe = replace(recipe, save_every=2)
    whole, resumed = (folder / name for name in ("whole", "resumed"))
    train_hydra(recipe, whole, only="stage1")
    state = partial_state()
    if state.is_main_process:
        shutil.copytree(whole, resumed)
        for part in ("final", "stage1/final", "stage1/checkpoint-3"):
            shutil.rmtree(resumed / part)
    state.wait_for_everyone()
    train_hydra(recipe, resumed, only="stage1")


def train_edits(folder: Path) -> None:
    """Three steps in which processes have different numbers of edits without a source, and so of calls of Sem-ViT."""
    base = folder.parent / "base"
    with partial_state().main_process_first():
        if not base.exists():
            toy_video_pipeline().save_pretrained(base)
    recipe = tiny.unimrg(str(base))
    stage = replace(
        recipe.stages[0], num_steps=3, tasks={"generate": 2, "edit": 4}, data=ToyData(), drop_prompt=0.4, warmup_steps=1,
        loss_weights=HydraLossWeights(pixels=200.0), **STAGE,
    )  # fmt: skip
    recipe = replace(recipe, stages=(stage,), log_every=1, save_every=10, sample_every=100, sample_prompts=("a cat",))
    train_hydra(recipe, folder)


def run(folder: Path, judges: Path) -> None:
    train_vision_tower(folder / "vision_tower", judges)
    train_language_model(folder / "hydra")
    train_edits(folder / "edits" / "whole")


if __name__ == "__main__":
    shard_on_cpus()
    run(*map(Path, sys.argv[1:]))
