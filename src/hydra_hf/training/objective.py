"""What a model is trained for. `BundleTrainer` runs an objective, which is all that another model has to provide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.modeling.flow import add_noise, predict_clean, sample_sigma, shift_sigma, velocity_target
from hydra_hf.modeling.grid import Grid, image_grids, noise_tokens, num_tokens, per_token
from hydra_hf.modeling.image_processing_hydra import packed_pixel_values

from .lora import add_adapters
from .randomness import grids_per_sample, row_noise
from .recipe import Data, HydraRecipe, HydraStage, freeze_unnamed


class Objective(Protocol):
    """Which modules are trained, and how a bundle of tasks becomes losses."""

    losses: Sequence[str]  # names of all losses that a task may have
    methods: Sequence[str]  # of the model, called by the objective: FSDP gathers weights for them as for `forward`

    def select_parameters(self, model: nn.Module) -> None:
        """Sets `requires_grad` of every parameter, and adds adapters if the stage has any."""

    def count_targets(self, model: nn.Module, batch: dict) -> dict[str, int]:
        """How many targets each loss has in a task's batch; 0 for a blank one."""

    def prepare(self, model: nn.Module, bundle: dict, task: str) -> dict:
        """The arguments of `model.forward` for the task's batch. Does not change `bundle`."""

    def losses_of(self, model: nn.Module, batch: dict, outputs) -> dict[str, Tensor]:
        """The losses of a batch as `prepare` made it, each a mean over its targets in the batch."""


class ModelKind(Protocol):
    """What a run does with a kind of model apart from its steps."""

    def create_objective(self, stage: HydraStage, seed: int) -> Objective:
        """The objective of a stage."""

    def create_model(self, recipe: HydraRecipe) -> PreTrainedModel:
        """The model that the first stage starts from."""

    def check_data(self, model: PreTrainedModel, stage: HydraStage, data: Data) -> None:
        """Raises ValueError for data that the stage cannot train the model on."""

    def open_model(self, folder: Path, recipe: HydraRecipe) -> PreTrainedModel:
        """The model that `save` wrote, for training: in fp32, whatever its dtype on disk."""

    def empty_model(self, recipe: HydraRecipe) -> PreTrainedModel:
        """A model of the recipe's sizes, to load gathered weights into."""

    def save(self, model: PreTrainedModel, recipe: HydraRecipe, folder: Path) -> None:
        """Writes all that users of the model need."""

    def save_compact(self, model: PreTrainedModel, recipe: HydraRecipe, folder: Path) -> None:
        """Writes the finished model after the last stage; its weights may be rounded."""

    def add_samples(self, trainer: Trainer, recipe: HydraRecipe, stage: HydraStage, folder: Path) -> None:
        """Makes the trainer generate sample images into `folder` while it trains, if there is anything to generate."""


def latent_grids_of(model: HydraForConditionalGeneration, batch: dict) -> list[Grid]:
    """The grids of the latents of a batch's images and clips."""
    return model.model.get_latent_grids(image_grids(batch["image_grid_thw"]))


@torch.no_grad()
def clean_latents(model: HydraForConditionalGeneration, batch: dict) -> Tensor:
    """Removes the images, pixels or stored means, from a batch; returns their normalised latents, packed (total_tokens, C)."""
    if "latent_means" in batch:
        return model.model.vision_tower.bottleneck.normalize(batch.pop("latent_means")).float()
    return model.encode_images(packed_pixel_values(batch.pop("pixel_values")), batch["image_grid_thw"]).float()


def pixel_loss(model: HydraForConditionalGeneration, batch: dict, velocity: Tensor) -> Tensor:
    """The squared error of the pixels, in [-1, 1], that the predicted latents of edits decode to, against those of the true
    latents: the mean over edits. All generated images are decoded, since FSDP needs as many calls on every process."""
    grids, is_generated = image_grids(batch["image_grid_thw"]), batch["is_generated"]
    chosen = per_token(is_generated, grids)
    noisy, sigma = batch["latents"][chosen], per_token(batch["sigma"], grids)[chosen]
    own_grids = batch["image_grid_thw"][is_generated.cpu()]
    predicted = model.decode_latents(predict_clean(noisy, velocity.float(), sigma), own_grids)
    with torch.no_grad():
        true = model.decode_latents(predict_clean(noisy, batch["velocity_target"], sigma), own_grids)
    errors = torch.stack([nn.functional.mse_loss(one, other) for one, other in zip(predicted, true)])
    is_edit = batch["num_sources"][is_generated] > 0
    return (errors * is_edit).sum() / is_edit.sum().clamp(min=1)


class HydraObjective:
    """L_NTP for the assistant's text, L_FM for generated images. HYDRA, section 2.2. All noise is added here, none by the
    model."""

    methods = ("encode_images", "decode_latents")

    def __init__(self, stage: HydraStage, seed: int):
        self.stage, self.seed = stage, seed

    @property
    def losses(self) -> tuple[str, ...]:
        return ("language", "flow", "pixels") if self.stage.loss_weights.pixels else ("language", "flow")

    def select_parameters(self, model: HydraForConditionalGeneration) -> None:
        freeze_unnamed(model, self.stage)
        if self.stage.lora_rank:
            add_adapters(model, self.stage, self.seed)

    def count_targets(self, model: HydraForConditionalGeneration, batch: dict) -> dict[str, int]:
        """How many text and image tokens of a batch have a target, and how many edited images."""
        if not batch["num_samples"]:
            return dict.fromkeys(self.losses, 0)
        num_generated = 0
        if "image_grid_thw" in batch:
            grids = zip(latent_grids_of(model, batch), batch["is_generated"].tolist())
            num_generated = sum(num_tokens(grid) for grid, is_generated in grids if is_generated)
        counts = {"language": int((batch["labels"][:, 1:] != -100).sum()), "flow": num_generated}
        if "pixels" in self.losses:
            counts["pixels"] = int((batch["num_sources"] > 0).sum()) if "num_sources" in batch else 0
        return counts

    def prepare(self, model: HydraForConditionalGeneration, bundle: dict, task: str) -> dict:
        """Turns images into latents, and adds noise to those that are to be generated."""
        batch = dict(bundle[task])
        batch.pop("num_samples")
        if not (batch["labels"][:, 1:] != -100).any():
            batch.pop("labels")
            batch["logits_to_keep"] = 1  # none is scored
        if "image_grid_thw" not in batch:
            return batch
        if self.stage.condition_grad_scale != 1:
            batch["condition_grad_scale"] = self.stage.condition_grad_scale
        if "pixels" in self.losses and TASKS[task].links_source:
            batch.setdefault("num_sources", torch.zeros_like(batch["is_generated"], dtype=torch.long))
        latents = clean_latents(model, batch)
        grids = latent_grids_of(model, batch)
        batch["image_grid_thw"] = torch.tensor(grids)  # on the CPU: the model reads it
        is_generated = batch.pop("is_generated")
        if not is_generated.any() and not TASKS[task].generates:
            return batch | {"latents": latents, "sigma": latents.new_zeros(len(grids))}
        sigma, noise = self.sample_noise(model, latents, grids, bundle, task)
        sigma = torch.where(is_generated, sigma, 0)
        if not is_generated.any():  # a loss of no targets: the vision head needs gradients, of 0, on every process
            is_generated = torch.arange(len(grids), device=is_generated.device) == 0
        return batch | {
            "latents": add_noise(latents, noise, per_token(sigma, grids)),
            "sigma": sigma,
            "is_generated": is_generated,
            "velocity_target": velocity_target(latents, noise)[per_token(is_generated, grids)],
        }

    def sample_noise(
        self, model: HydraForConditionalGeneration, latents: Tensor, grids: list[Grid], bundle: dict, task: str
    ) -> tuple[Tensor, Tensor]:
        """Noise levels (num_images,) and packed noise of a batch's images, each row's from its own generator."""

        def sample(grids: list[Grid], generator: torch.Generator) -> tuple[Tensor, Tensor]:
            levels = self.sample_levels(model, grids, task, generator)
            return levels, noise_tokens(grids, latents.shape[1], generator)

        own_grids = grids_per_sample(bundle[task], grids)
        step, rows = int(bundle["step"]), bundle["rows"][task]
        sigma, noise = row_noise(step, task, rows, own_grids, sample, seed=self.seed)
        return sigma.to(latents.device), noise.to(latents.device)

    def sample_levels(
        self, model: HydraForConditionalGeneration, grids: list[Grid], task: str, generator: torch.Generator
    ) -> Tensor:
        """Noise levels (num_images,) of images with these grids."""
        sigma = sample_sigma(len(grids), logit_std=model.config.sigma_logit_std, generator=generator)
        own = self.stage.sigma_shifts.get(task)
        shifts = [own or model.get_sigma_shift(num_tokens(grid)) for grid in grids]
        return torch.stack([shift_sigma(each, shift) for each, shift in zip(sigma, shifts)])

    def losses_of(self, model: HydraForConditionalGeneration, batch: dict, outputs) -> dict[str, Tensor]:
        losses = {"language": outputs.language_loss, "flow": outputs.flow_loss}
        if "pixels" in self.losses and "num_sources" in batch:
            losses["pixels"] = pixel_loss(model, batch, outputs.velocity)
        return {name: value for name, value in losses.items() if value is not None}
