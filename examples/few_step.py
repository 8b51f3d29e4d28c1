"""Drawing in four steps without guidance: the vision head of the embedded checkpoint, distilled from many guided steps.

python examples/few_step.py --out runs/few_step

A student takes each of its few steps where the frozen teacher takes several, with classifier-free guidance at each of them:
guidance distillation (Meng et al. 2023, arXiv 2210.03142) and progressive distillation (Salimans and Ho 2022, arXiv 2202.00512)
in one regression. From x at sigma, the teacher reaches x' at the student's next sigma', and the student's velocity
is trained to be (x - x') / (sigma - sigma'), which carries it there in one Euler step. Only the vision head is trained, so the
model's answers do not change. The run is one of `hydra_hf.training`: killed and started again, it resumes at its last checkpoint.

It writes OUT/final, a pipeline whose defaults are the student's steps and no guidance, and OUT/scores.json with the share of
right images of held-out prompts: of the teacher, of the teacher at the student's steps with and without guidance, of the student.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hydra_hf
from hydra_hf import HydraConfig, HydraForConditionalGeneration, HydraPipeline, HydraProcessor
from hydra_hf.files import write_text
from hydra_hf.modeling.flow import euler_step, inference_sigmas, shift_sigma, unshift_sigma
from hydra_hf.modeling.grid import Grid, image_grids, num_tokens, per_token
from hydra_hf.modeling.image_generation import GuidanceBranch, classifier_free
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.evaluation import evaluate_generation
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.hydra_trainer import HydraKind, train_model
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.recipe import HydraRecipe, HydraStage


@dataclass(frozen=True, kw_only=True)
class DistillationStage(HydraStage):
    """Args:
    teacher: a pipeline's folder or Hub id.
    student_steps: how many steps the student draws in.
    teacher_steps: how many the teacher takes for each of them.
    teacher_guidance_scale: of each of the teacher's steps.
    """

    teacher: str
    student_steps: int
    teacher_steps: int
    teacher_guidance_scale: float


class DistillationObjective(HydraObjective):
    """The flow loss of images at the student's noise levels, with the teacher's direction instead of noise - data."""

    losses = ("flow",)
    methods = ("encode_images",)

    def __init__(self, stage: DistillationStage, seed: int):
        super().__init__(stage, seed)
        teacher = HydraForConditionalGeneration.from_pretrained(stage.teacher, subfolder="model", dtype=torch.float32)
        self.teacher = teacher.eval().requires_grad_(False)

    def count_targets(self, model: HydraForConditionalGeneration, batch: dict) -> dict[str, int]:
        return {"flow": super().count_targets(model, batch)["flow"]}

    def sample_levels(
        self, model: HydraForConditionalGeneration, grids: list[Grid], task: str, generator: torch.Generator
    ) -> Tensor:
        """One of the noise levels at which the student evaluates, for each image."""
        steps = torch.randint(self.stage.student_steps, (len(grids),), generator=generator)
        shifts = [model.get_sigma_shift(num_tokens(grid)) for grid in grids]
        levels = [inference_sigmas(self.stage.student_steps, shift) for shift in shifts]
        return torch.stack([each[step] for each, step in zip(levels, steps)])

    def prepare(self, model: HydraForConditionalGeneration, bundle: dict, task: str) -> dict:
        batch = super().prepare(model, bundle, task)
        batch.pop("labels", None)
        grids, latents = image_grids(batch["image_grid_thw"]), batch["latents"]
        sigmas = self.teacher_sigmas(batch["sigma"], grids)
        self.teacher.to(latents.device)
        reached = self.teach(latents, sigmas, self.branches(batch), batch["image_grid_thw"])
        distance = per_token(sigmas[0] - sigmas[-1], grids)[:, None]
        return batch | {"velocity_target": (latents - reached) / distance, "logits_to_keep": 1}

    def teacher_sigmas(self, sigma: Tensor, grids: list[Grid]) -> Tensor:
        """The teacher's noise levels (teacher_steps + 1, num_images), from `sigma` to the student's next one."""
        shifts = sigma.new_tensor([self.teacher.get_sigma_shift(num_tokens(grid)) for grid in grids])
        parts = torch.linspace(0, 1 / self.stage.student_steps, self.stage.teacher_steps + 1, device=sigma.device)
        return shift_sigma((unshift_sigma(sigma, shifts) - parts[:, None]).clamp(min=0), shifts)

    @torch.no_grad()
    def teach(self, latents: Tensor, sigmas: Tensor, branches: list[GuidanceBranch], grid_thw: Tensor) -> Tensor:
        """Packed latents after the teacher's guided steps from `sigmas[0]` to `sigmas[-1]`."""
        grids = image_grids(grid_thw)
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
            velocity = self.teacher.denoise_step(latents, sigma, branches, image_grid_thw=grid_thw)
            levels = (per_token(each, grids)[:, None] for each in (sigma, next_sigma))
            latents = euler_step(latents, velocity, *levels)
        return latents

    @torch.no_grad()
    def branches(self, batch: dict) -> list[GuidanceBranch]:
        """The teacher's guidance from no prompt to the prompts, which end where the images begin."""
        input_ids, config = batch["input_ids"], self.teacher.config
        lengths = ((input_ids == config.vision_start_token_id).int().argmax(dim=1) + 1).tolist()

        def up_to_images(rows: Tensor, padding: int) -> Tensor:
            parts = [row[:length] for row, length in zip(rows, lengths)]
            return torch.nn.utils.rnn.pad_sequence(parts, True, padding, padding_side="left")

        prompt_ids = up_to_images(input_ids, config.text_config.pad_token_id)
        mask = up_to_images(batch["attention_mask"], 0)
        null_ids = input_ids.new_tensor(config.null_prompt_ids).expand(len(input_ids), -1)
        null = self.teacher.prefill(null_ids, torch.ones_like(null_ids))
        return classifier_free(self.teacher.prefill(prompt_ids, mask), null, self.stage.teacher_guidance_scale)


class DistilledHydra(HydraKind):
    def create_objective(self, stage: DistillationStage, seed: int) -> DistillationObjective:
        return DistillationObjective(stage, seed)


def create_recipe(options: argparse.Namespace) -> HydraRecipe:
    stage = DistillationStage(
        name="distill",
        num_steps=options.num_updates,
        tasks={"generate": options.batch_size},
        learning_rates=dict.fromkeys(options.modules, options.learning_rate),
        data=ToyData(),
        held_out=ToyData(is_held_out=True),
        drop_prompt=0.0,
        warmup_steps=10,
        ema_decay=0.99,
        decay_share=0.5,
        weight_decay=0.0,
        teacher=options.model,
        student_steps=options.student_steps,
        teacher_steps=options.teacher_steps,
        teacher_guidance_scale=options.guidance_scale,
    )
    return HydraRecipe(
        name="few_step",
        config=HydraConfig.from_pretrained(options.model, subfolder="model"),
        stages=(stage,),
        init=options.model,
        tokenizer=None,
        processor=HydraProcessor.from_pretrained(options.model, subfolder="processor"),
        seed=options.seed,
        num_inference_steps=options.student_steps,
        guidance_scale=1.0,
        log_every=10,
        save_every=40,
        num_workers=options.num_workers,
        sample_every=options.num_updates,
    )


def measure(model: str | Path, options: argparse.Namespace, **kwargs) -> float:
    """The share of right images of held-out prompts, at the pipeline's defaults or with `kwargs`."""
    pipeline = HydraPipeline.from_pretrained(model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    language = ToyLanguage(ToyWorld(1))
    scores = evaluate_generation(pipeline, language, options.prompts_per_category, options.seed, **kwargs)
    return round(scores["t2i/mean"], 4)


def evaluate(final: Path, options: argparse.Namespace) -> dict:
    """The scores, which are written after each of them: those of the teacher take the longest."""
    steps = options.student_steps
    settings = {
        f"student, {steps} steps": (final, {}),
        f"teacher, {steps} steps": (options.model, {"num_inference_steps": steps, "guidance_scale": 1.0}),
        f"teacher, {steps} guided steps": (options.model, {"num_inference_steps": steps}),
        "teacher": (options.model, {}),
    }
    scores = {"prompts_per_category": options.prompts_per_category}
    for name, (model, kwargs) in settings.items():
        scores[name] = measure(model, options, **kwargs)
        write_text(options.out / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hydra_hf.TINY, help="folder or Hub id of the teacher's pipeline")
    parser.add_argument("--out", type=Path, default=Path("runs/few_step"))
    parser.add_argument("--student_steps", type=int, default=4)
    parser.add_argument("--teacher_steps", type=int, default=2, help="for each of the student's")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--modules", nargs="+", default=["vision_head"], help="what is trained")
    parser.add_argument("--num_updates", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that make the batches")
    parser.add_argument("--prompts_per_category", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(options: argparse.Namespace) -> dict:
    """Trains and measures; the scores."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Got --device cuda, but torch sees no GPU.")
    final = train_model(DistilledHydra(), create_recipe(options), options.out, on_stage=print)
    return evaluate(final, options)


if __name__ == "__main__":
    given = create_parser().parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first use of a GPU
    print(json.dumps(main(given), indent=2))
