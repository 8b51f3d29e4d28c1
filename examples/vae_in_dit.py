"""HYDRA-TOK as the VAE of a diffusion transformer of diffusers, on the toy world.

    python examples/vae_in_dit.py --transformer dit --out runs/dit
    python examples/vae_in_dit.py --transformer sana --out runs/sana

After HYDRA, appendix D.1, which puts HYDRA-TOK in place of Nitro-E's VAE, trains 15k steps on SA-1B and JourneyDB and measures
GenEval. `dit` draws one object by its class (`DiTTransformer2DModel`, `DiTPipeline`); `sana` draws from captions
(`SanaTransformer2DModel`, `SanaPipeline`), with HYDRA's own language model as the frozen text encoder. Images are encoded once
by the frozen tokenizer; the transformer learns the velocity of its latents; diffusers draws with DPM-Solver++.
OUT gets the pipeline, `scores.json` (pairs and counts are held out; the judge is a checker without learned weights), `samples.png`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

import hydra_hf
from hydra_hf import HydraPipeline
from hydra_hf.files import write_image_grid, write_text
from hydra_hf.modeling.flow import (
    add_noise,
    flow_matching_loss,
    resolution_shift,
    sample_sigma,
    velocity_target,
)
from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.language import CATEGORIES, Prompt, ToyLanguage
from hydra_hf.toy.world import CANVAS, ToyWorld


NULL_CLASS = 1000  # DiTPipeline's, whatever the number of classes is
MAX_TOKENS = 24  # of a caption
WIDTH, HEADS, LAYERS = 192, 3, 4  # of both transformers
DROPPED = 0.1  # share of conditions that training drops, for classifier-free guidance


class HydraSanaPipeline(SanaPipeline):
    """SANA's pipeline with HYDRA-TOK in place of DC-AE, whose config it reads for the size of a latent."""

    def __init__(self, tokenizer, text_encoder, vae, transformer, scheduler):
        super().__init__(tokenizer, text_encoder, None, transformer, scheduler)
        self.register_modules(vae=vae)
        self.vae_scale_factor = vae.config.patch_size


class Task:
    """Prompts of the toy world, after GenEval's categories, and the pipeline that draws them."""

    categories = CATEGORIES

    def __init__(self, hydra: HydraPipeline, language: ToyLanguage, scheduler: DPMSolverMultistepScheduler):
        self.language, self.tokenizer = language, hydra.model.model.vision_tower
        channels = self.tokenizer.config.latent_channels
        sizes = {
            "in_channels": channels, "out_channels": channels, "num_layers": LAYERS, "patch_size": 1,
            "sample_size": CANVAS[0] // self.tokenizer.config.patch_size,
        }  # fmt: skip
        self.pipeline = self.create_pipeline(hydra, sizes, scheduler)
        self.pipeline.transformer.eval()  # DiT would drop the class in each block on its own; nothing else differs
        self.pipeline.set_progress_bar_config(disable=True)

    def sample(self, number: int, split: str, generator: torch.Generator) -> tuple[Tensor, list[Prompt]]:
        """Images (B, 3, H, W) in [-1, 1], and their prompts."""
        options = {"split": split, "categories": self.categories, "phrasings": ("plain",)}
        prompts, scenes = self.language.sample_prompts(number, generator, **options)
        return self.language.world.render(scenes), prompts


class ClassTask(Task):
    """One object, by its number."""

    categories = ("single_object", "colors")

    def create_pipeline(self, hydra, sizes, scheduler) -> DiTPipeline:
        transformer = DiTTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_embeds_ada_norm=NULL_CLASS, **sizes
        )
        labels = dict(enumerate(self.language.world.names))
        return DiTPipeline(transformer, self.tokenizer, scheduler, id2label=labels)

    def conditions(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([prompt.objects[0] for prompt in prompts])}

    def null_conditions(self) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([NULL_CLASS])}

    def draw(self, prompts: list[Prompt], **kwargs) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        classes = [prompt.objects[0] for prompt in prompts]
        images = self.pipeline(
            classes, output_type="np", **kwargs
        ).images  # older versions of DiTPipeline have no "pt"
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


class CaptionTask(Task):
    """Captions of all categories."""

    def create_pipeline(self, hydra, sizes, scheduler) -> HydraSanaPipeline:
        text_encoder = hydra.model.model.language_model
        transformer = SanaTransformer2DModel(
            num_attention_heads=WIDTH // 32, attention_head_dim=32, num_cross_attention_heads=HEADS,
            cross_attention_head_dim=WIDTH // HEADS, cross_attention_dim=WIDTH,
            caption_channels=text_encoder.config.hidden_size, interpolation_scale=1, **sizes,
        )  # fmt: skip
        return HydraSanaPipeline(hydra.processor.tokenizer, text_encoder, self.tokenizer, transformer, scheduler)

    def conditions(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        return self._encode([prompt.text for prompt in prompts])

    def null_conditions(self) -> dict[str, Tensor]:
        return self._encode([""])

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(texts, False, max_sequence_length=MAX_TOKENS)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def draw(self, prompts: list[Prompt], **kwargs) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        texts, (height, width) = [prompt.text for prompt in prompts], CANVAS
        images = self.pipeline(
            texts, height=height, width=width, output_type="pt", use_resolution_binning=False, clean_caption=False,
            max_sequence_length=MAX_TOKENS, complex_human_instruction=None, **kwargs,
        ).images  # fmt: skip
        return images * 2 - 1


def create_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ for velocities, as SANA has it."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


TASKS = {"dit": ClassTask, "sana": CaptionTask}


@torch.no_grad()
def in_batches(function, rows, batch_size: int = 256) -> list:
    return [function(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train(task: Task, shift: float, options: argparse.Namespace) -> None:
    """Flow matching in the latents of the frozen tokenizer."""
    pipeline, generator = task.pipeline, torch.Generator().manual_seed(options.seed)
    images, prompts = task.sample(options.num_images, "train", generator)
    latents = torch.cat(in_batches(lambda part: pipeline.vae.encode(part).latent, images))  # (B, C, h, w), normalised
    conditions, nothing = joined(in_batches(task.conditions, prompts)), task.null_conditions()
    transformer = pipeline.transformer
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.num_steps // 20, options.num_steps)
    ema, start = EMAModel(transformer.parameters(), decay=0.998, use_ema_warmup=True, power=0.75), time.time()
    for step in range(1, options.num_steps + 1):
        rows = torch.randint(len(latents), (options.batch_size,), generator=generator)
        clean, noise = latents[rows], torch.randn(len(rows), *latents.shape[1:], generator=generator)
        sigma = sample_sigma(len(rows), shift=shift, generator=generator)
        is_dropped = torch.rand(len(rows), generator=generator) < DROPPED
        given = {name: values[rows] for name, values in conditions.items()}
        for name, values in given.items():
            values[is_dropped] = nothing[name]
        velocity = transformer(add_noise(clean, noise, sigma), timestep=1000 * sigma, **given).sample
        loss = flow_matching_loss(velocity, velocity_target(clean, noise))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(transformer.parameters())
        if step % options.log_every == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    ema.copy_to(transformer.parameters())


def score(task: Task, world: ToyWorld, options: argparse.Namespace) -> tuple[dict, Tensor]:
    """Share of prompts of the test split with a right image, in all and by category; the same for true images that the tokenizer rebuilds."""
    checker, generator = ToyChecker(world), torch.Generator().manual_seed(options.seed + 1)
    images, prompts = task.sample(options.num_prompts, "test", generator)
    settings = {
        "generator": generator, "num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale,
    }  # fmt: skip
    drawn = torch.cat(in_batches(lambda part: task.draw(part, **settings), prompts))
    vae = task.pipeline.vae
    rebuilt = torch.cat(
        in_batches(lambda part: vae.decode(vae.encode(part).latent, generator=generator).sample, images)
    )
    scores = {}
    for name, pictures in (("drawn", drawn), ("rebuilt", rebuilt)):
        right = torch.tensor([checker.check(image, prompt) for image, prompt in zip(pictures, prompts)]).float()
        for category in CATEGORIES:
            if any(chosen := [prompt.category == category for prompt in prompts]):
                scores[f"{name}/{category}"] = right[torch.tensor(chosen)].mean().item()
        scores[f"{name}/all"] = right.mean().item()
    return scores, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer", choices=tuple(TASKS), default="dit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=hydra_hf.TINY, help="the HYDRA whose tokenizer and language model are used")
    parser.add_argument("--num_steps", type=int, default=1200)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_images", type=int, default=8192, help="to train on, encoded once")
    parser.add_argument("--num_prompts", type=int, default=192, help="to draw for the score")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--log_every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)  # the first weights
    world, hydra, start = ToyWorld(difficulty=1), HydraPipeline.from_pretrained(options.model), time.process_time()
    hydra.model.requires_grad_(False)
    config = hydra.model.config.vision_config
    shift = resolution_shift(config.latent_channels * (CANVAS[0] // config.patch_size) ** 2)
    task = TASKS[options.transformer](hydra, ToyLanguage(world), create_scheduler(shift))
    train(task, shift, options)
    task.pipeline.save_pretrained(options.out / "pipeline")
    scores, drawn = score(task, world, options)
    scores |= {
        "cpu_minutes": (time.process_time() - start) / 60,
        "parameters": sum(parameter.numel() for parameter in task.pipeline.transformer.parameters()),
        **{name: value for name, value in vars(options).items() if name not in ("out", "log_every", "model")},
    }
    print(json.dumps(scores, indent=2))
    write_text(options.out / "scores.json", json.dumps(scores, indent=2) + "\n")
    write_image_grid(options.out / "samples.png", drawn[:48], num_columns=12)


if __name__ == "__main__":
    main()
