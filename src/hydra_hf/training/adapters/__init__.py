"""Other unified models under UniMRG: what a model must provide, and what trains it. UniMRG, section 3.

`UnifiedModel` is the contract. `UnifiedObjective` and `UnifiedKind` connect such a model to the trainer: samples, tasks,
weights, checkpoints, adapters and logs are HYDRA's. Each file here is one kind of model:
`janus` (autoregressive), `openuni` (autoregressive and diffusion), `harmon` (autoregressive and masked).
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from hydra_hf.data.tasks import task_number
from hydra_hf.modeling import HydraImageProcessor, HydraProcessor
from hydra_hf.modeling.grid import Grid, image_starts, unpack_images
from hydra_hf.modeling.image_processing_hydra import packed_pixel_values
from hydra_hf.training.hydra_trainer import train_model
from hydra_hf.training.latents import latent_folders
from hydra_hf.training.lora import add_adapters
from hydra_hf.training.painted_grids import NUM_IMAGES, PaintedGrids
from hydra_hf.training.randomness import noise_number, row_generator
from hydra_hf.training.recipe import Data, HydraStage, UnifiedRecipe, freeze_unnamed


logger = logging.getLogger(__name__)


@dataclass
class PaintingOutput(ModelOutput):
    """The loss of generated images, a mean over the images of the batch."""

    loss: Tensor


class UnifiedModel(Protocol):
    """A `PreTrainedModel` that answers and generates images. All pixels are (B, 3, H, W) in [-1, 1], of one size.

    A prompt that asks for an image ends where the image begins, after the begin-of-image token if the model has one; given
    images have placeholders in it. All randomness of the model comes from the generators that are passed to it.
    """

    config: PreTrainedConfig
    frozen_modules: ClassVar[
        tuple[str, ...]
    ]  # prefixes of parameter names that UniMRG never trains; all else is trained
    adapted_modules: ClassVar[
        tuple[str, ...]
    ]  # prefixes whose linear layers get adapters instead of being trained in full

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        generators: list[torch.Generator] | None = None,
    ) -> ModelOutput:
        """With `labels`, an output whose `loss` is the mean cross entropy of the labelled tokens; with `target_pixel_values`,
        a `PaintingOutput`, with noise from `generators`, one on the CPU for each row."""

    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The images (B, 3, H, W) in [-1, 1] that the prompts ask for; a `guidance_scale` of 1 turns guidance off."""


class UnifiedProcessor(HydraProcessor):
    """Chats in the format of another model, for `data` and the toy world; what is saved is the model's own processor.

    Images lose their aspect ratio: all have one size, and `num_image_tokens` placeholders.
    """

    def __init__(
        self,
        image_processor: HydraImageProcessor,
        tokenizer,
        *,
        num_image_tokens: int,
        chat_template: str,
        own: ProcessorMixin | None = None,
    ):
        self.num_image_tokens, self.own = num_image_tokens, own
        patch_size = image_processor.patch_size
        super().__init__(image_processor, deepcopy(tokenizer), patch_size=patch_size, chat_template=chat_template)

    def image_length(self, grid: Grid) -> int:
        return self.num_image_tokens


class UnifiedObjective:
    """L_NTP for answers, and the model's own loss for generated images. UniMRG, section 3."""

    losses = ("language", "image")
    methods = ()

    def __init__(self, stage: HydraStage, seed: int):
        self.stage, self.seed = stage, seed

    def select_parameters(self, model: UnifiedModel) -> None:
        freeze_unnamed(model, self.stage)
        if self.stage.lora_rank:
            add_adapters(model, self.stage, self.seed)

    def count_targets(self, model: UnifiedModel, batch: dict) -> dict[str, int]:
        """The number of images to generate in a batch, or if there are none, of tokens with a label."""
        if not batch["num_samples"]:
            return dict.fromkeys(self.losses, 0)
        num_generated = int(batch["is_generated"].sum()) if "is_generated" in batch else 0
        num_labels = 0 if num_generated else int((batch["labels"][:, 1:] != -100).sum())
        return {"language": num_labels, "image": num_generated}

    def prepare(self, model: UnifiedModel, bundle: dict, task: str) -> dict:
        """Arguments of `forward`: unpacked images, and if a chat ends with an image, only the prompt before it."""
        batch = bundle[task]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        if "pixel_values" not in batch:
            return inputs
        patch_size = isqrt(batch["pixel_values"].shape[1] // 3)
        pixel_values = packed_pixel_values(batch["pixel_values"])
        images = torch.stack(unpack_images(pixel_values, batch["image_grid_thw"], patch_size))
        is_generated = batch["is_generated"]
        if not is_generated.any():
            return inputs | {"pixel_values": images}
        length = length_of_prompts(batch["mm_token_type_ids"] == 1, is_generated)
        prompts = {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask")}
        given = {} if is_generated.all() else {"pixel_values": images[~is_generated]}
        generators = self.generators(bundle, task)
        return prompts | given | {"target_pixel_values": images[is_generated], "generators": generators}

    def generators(self, bundle: dict, task: str) -> list[torch.Generator]:
        """A generator for each row, the same in whichever process and micro step the row is."""
        rows, number = bundle["rows"][task], task_number(task)
        return [row_generator(self.seed, int(bundle["step"]), noise_number(row, number)) for row in rows]

    def losses_of(self, model: UnifiedModel, batch: dict, outputs: ModelOutput) -> dict[str, Tensor]:
        return {"image" if isinstance(outputs, PaintingOutput) else "language": outputs.loss}


def length_of_prompts(is_image: Tensor, is_generated: Tensor) -> int:
    """How many tokens precede the generated image of each row (B, L). Raises ValueError unless each row ends with one image."""
    lengths = {int(row.nonzero()[-1]) for row in image_starts(is_image)}
    if len(lengths) != 1 or int(is_generated.sum()) != len(is_image):
        raise ValueError(
            f"Got {int(is_generated.sum())} images to generate in {len(is_image)} samples, after {sorted(lengths)} tokens,"
            " expected one in each, and nothing after it."
        )
    return lengths.pop()


def unified_rates(model_class: type[UnifiedModel], rate: float) -> dict[str, float]:
    """The learning rates by the paper's rule: `rate` for everything except the modules that the model names as frozen."""
    return {"": rate, **dict.fromkeys(model_class.frozen_modules, 0.0)}


class UnifiedKind:
    """What a run does with another model apart from its steps; see `objective.ModelKind`."""

    def create_objective(self, stage: HydraStage, seed: int) -> UnifiedObjective:
        return UnifiedObjective(stage, seed)

    def create_model(self, recipe: UnifiedRecipe) -> PreTrainedModel:
        return self.open_model(recipe.init, recipe)

    def check_data(self, model: UnifiedModel, stage: HydraStage, data: Data) -> None:
        if folders := latent_folders(stage, data):
            raise ValueError(
                f"Got latents={folders[0]}, which are HYDRA's, for a {type(model).__name__}: leave latents=... out."
            )

    def open_model(self, folder: str | Path, recipe: UnifiedRecipe) -> PreTrainedModel:
        return recipe.model_class.from_pretrained(
            folder, attn_implementation=recipe.attn_implementation, dtype=torch.float32
        )

    def empty_model(self, recipe: UnifiedRecipe) -> PreTrainedModel:
        return recipe.model_class._from_config(recipe.config)

    def save(self, model: PreTrainedModel, recipe: UnifiedRecipe, folder: Path) -> None:
        """Saves the model as its own library does, with its own processor."""
        model.save_pretrained(folder)
        if recipe.processor.own is not None:
            recipe.processor.own.save_pretrained(folder)

    save_compact = save  # also in fp32: whether it may be rounded, its users know

    def add_samples(self, trainer, recipe: UnifiedRecipe, stage: HydraStage, folder: Path) -> None:
        if trainer.held_out:
            paint = partial(self.paint, recipe)
            trainer.add_callback(PaintedGrids(trainer, recipe, paint, folder))

    def paint(
        self, recipe: UnifiedRecipe, model: PreTrainedModel, bundle: dict, task: str, generator: torch.Generator
    ) -> list[list[Tensor]]:
        """Rows of what is given, expected and painted; see `PaintedGrids`."""
        inputs = UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model, bundle, task)
        inputs.pop("generators")
        targets = inputs.pop("target_pixel_values")[:NUM_IMAGES]
        inputs = {name: value[:NUM_IMAGES] for name, value in inputs.items()}
        painted = model.generate_images(**inputs, guidance_scale=recipe.guidance_scale, generator=generator)
        return [list(inputs["pixel_values"]), list(targets), list(painted)]


def train_unified(
    recipe: UnifiedRecipe, output_dir: Path, *, only: str | None = None, on_stage: Callable[[str], None] = logger.info
) -> Path:
    """`train_model` for a model that is not HYDRA. Raises ValueError for a recipe without `init`."""
    if recipe.init is None:
        raise ValueError(f"{recipe.name} needs init, the folder or Hub id of the model.")
    return train_model(UnifiedKind(), recipe, output_dir, only=only, on_stage=on_stage)
