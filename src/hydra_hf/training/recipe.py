"""The schema of a recipe: everything that decides the outcome of a run, as frozen values.

`learning_rates` maps a module to its rate; what is not named is frozen.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_utils import SizeDict

from hydra_hf.data.images import Batches
from hydra_hf.data.sources import Source, Sources
from hydra_hf.data.tasks import check_task
from hydra_hf.modeling import (
    HydraConfig,
    HydraImageProcessor,
    HydraProcessor,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
)


class Data(Protocol):
    """What a stage is trained on: `data.sources.Sources`, or the toy world (`toy.batches.ToyData`)."""

    is_streaming: bool  # read in order, by the training process itself
    has_clips: bool  # for a vision tower
    num_workers: int  # processes that read ahead, unless the recipe says how many

    def bundles(self, stage: "HydraStage", processor: HydraProcessor, seed: int, **place: int) -> Dataset:
        """One bundle of tasks for each micro step of this process."""

    def images(self, image_sizes: tuple[int, ...], batch_size: int, seed: int) -> Batches:
        """Images alone, for the vision tower."""

    def clips(self, image_size: int, num_frames: int, batch_size: int, seed: int) -> Batches:
        """Clips alone, for the vision tower."""

    def sample_prompts(self, seed: int) -> tuple[str, ...]:
        """Prompts of the images that are generated while training; () if the data has none."""


@dataclass(frozen=True, kw_only=True)
class TokenizerLossWeights:
    """HYDRA, section 3.3, and HYDRA-X, section 2; a loss of weight 0 is not computed.

    `distill` is that of images and first frames, `video_distill` that of the other frames of clips; both are L_dist.
    `regression` is that of a ViT decoder, `flow` that of a flow decoder; `discriminator` is the discriminator's own loss,
    `adversarial` the decoder's loss from its judgement.
    """

    regression: float = 1.0
    flow: float = 1.0
    kl: float = 1e-4
    cosine: float = 1.0
    distill: float = 0.0
    video_distill: float = 0.0
    perceptual: float = 0.0
    adversarial: float = 0.0
    discriminator: float = 0.0


@dataclass(frozen=True, kw_only=True)
class HydraLossWeights:
    """HYDRA, section 2.2: L = L_NTP + L_FM. Each is a mean over one task's tokens of a step, see `HydraStage.task_weights`.

    Args:
        pixels: of edits, the squared error of the pixels that the predicted latents decode to (our choice). Latents may give
            little room to what fills a picture, such as the color of a flat background. Only edits have it: what a prompt
            alone leaves open has many pictures, and the mean of their pixels is none. Needs a decoder that regresses pixels.
    """

    language: float = 1.0
    flow: float = 1.0
    pixels: float = 0.0


@dataclass(frozen=True, kw_only=True)
class UnifiedLossWeights:
    """Loss weights of another unified model (`training.adapters`): text, and generated images by the model's own loss. UniMRG,
    section 3."""

    language: float = 1.0
    image: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Args:
        num_steps: optimizer steps.
        data: data to train on; None is that of the recipe.
        held_out: data to measure while training, never trained on; None measures nothing.
        num_held_out: how many samples of each task are measured.
        learning_rates: module -> AdamW's rate. A key is a prefix of parameter names; the longest that matches counts.
        muon_scale: Muon trains the matrices of hidden layers at this multiple of the rate; 0 leaves all to AdamW.
        warmup_steps: steps over which the rate rises from 0.
        decay_share: share of the steps, at the end, over which the rate falls linearly to a twentieth.
        ema_decay: decay of the average of the weights; 0 keeps none, which saves a copy of the weights.
        mixed_precision: bf16, fp16 or no.
    """

    name: str
    num_steps: int
    learning_rates: dict[str, float]
    data: Data | None = None
    held_out: Data | None = None
    num_held_out: int = 16
    muon_scale: float = 0.0
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_share: float = 0.4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "bf16"

    def __post_init__(self):
        if self.num_steps < 1 or self.warmup_steps < 1:
            raise ValueError(
                f"{self.name}: num_steps={self.num_steps} and warmup_steps={self.warmup_steps} must be at least 1."
            )

    def learning_rate_of(self, parameter_name: str) -> float:
        """The rate of a parameter; 0 is frozen."""
        prefixes = [prefix for prefix in self.learning_rates if parameter_name.startswith(prefix)]
        return self.learning_rates[max(prefixes, key=len)] if prefixes else 0.0

    def learning_rate_factor(self, step: int) -> float:
        """The factor on every rate at `step`: warm-up, plateau, decay."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay_steps = max(1, round(self.decay_share * self.num_steps))
        return warmup * min(1.0, max(0.05, (self.num_steps - step) / decay_steps))


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(Stage):
    """Args:
    batch_size: images of one optimizer step, over all processes and accumulation.
    image_sizes: sides of square images; a step has one of them, large ones less often, in proportion to 1 / size^2. () is the
        `image_size` of the config; the toy world has its own canvases.
    loss_weights: the weight of each loss, see `TokenizerLossWeights`; 0 leaves it out.
    clip_share: share of the steps that train on clips instead of images.
    num_frames: of a clip, 1 + 4n.
    images_per_clip: how many images of a step one clip takes the place of, so that both cost about the same (our choice).
    keeps_image_latents: of the folds and the patch projection, train only what reads the frames before an anchor, so that
        latents of images stay as they are; their biases and all else of the encoder are frozen, and `weight_decay` is 0.
    one_step_prob: share of samples at exactly sigma = 1, where one-step decoding evaluates (our choice).
    teacher: frozen ViT to distill from: folder or Hub id, timm:NAME, or a function that makes one; see `training.teachers`.
    teacher_weights: safetensors of a timm teacher.
    distill_layers: blocks, counted from 1, whose outputs are trained to match the teacher's; () is the output of Sem-ViT. Of a
        clip they are those of its first frame.
    video_teacher: frozen teacher of clips, for the frames after the first, see `training.video_teachers`.
    video_teacher_size: its width.
    perceptual_backbone: lpips:vgg, lpips:alex, lpips:squeeze, or timm:NAME, a feature distance that is not LPIPS.
    perceptual_weights: safetensors of the backbone's trunk.
    discriminator_start: first step with the adversarial loss.
    adaptive_adversarial_weight: scale `adversarial` by the ratio of the gradients at the decoder's last layer.
    frechet_backbone, frechet_weights: timm:NAME of the network for a Frechet distance during training, and its safetensors.
    """

    batch_size: int
    image_sizes: tuple[int, ...] = ()
    clip_share: float = 0.0
    num_frames: int = 17
    images_per_clip: int = 4
    keeps_image_latents: bool = False
    decoder_config: PixelFlowDecoderConfig | PixelViTDecoderConfig
    loss_weights: TokenizerLossWeights = field(default_factory=TokenizerLossWeights)
    one_step_prob: float = 0.1
    teacher: str | Callable[[], nn.Module] | None = None
    teacher_weights: str | None = None
    distill_layers: tuple[int, ...] = ()
    video_teacher: str | Callable[[], nn.Module] | None = None
    video_teacher_size: int | None = None
    perceptual_backbone: str = "lpips:vgg"
    perceptual_weights: str | None = None
    discriminator_learning_rate: float = 1e-4
    discriminator_start: int = 0
    adaptive_adversarial_weight: bool = False
    frechet_backbone: str | None = None
    frechet_weights: str | None = None

    def __post_init__(self):
        super().__post_init__()
        weights = self.loss_weights
        if not 0 <= self.clip_share <= 1 or self.images_per_clip < 1:
            raise ValueError(
                f"{self.name}: {self.clip_share=} must be 0 to 1, and {self.images_per_clip=} at least 1."
            )
        if self.keeps_image_latents and self.weight_decay:
            raise ValueError(f"{self.name}: {self.weight_decay=} changes the latents of images, expected 0.")
        if weights.adversarial > 0 and not weights.discriminator > 0:
            raise ValueError(
                f"{self.name}: {weights.adversarial=} needs a discriminator, but {weights.discriminator=}."
            )
        if weights.distill > 0 and not self.teacher:
            raise ValueError(f"{self.name}: {weights.distill=} needs a teacher, got {self.teacher=}.")
        needed = (self.video_teacher, self.video_teacher_size, self.clip_share)
        if weights.video_distill > 0 and not all(needed):
            raise ValueError(
                f"{self.name}: {weights.video_distill=} needs a video teacher and clips, got {self.video_teacher=}"
                f" {self.video_teacher_size=} {self.clip_share=}."
            )

    @property
    def compared_layers(self) -> tuple[int, ...] | None:
        """`distill_layers`, None if nothing is distilled."""
        return self.distill_layers if self.loss_weights.distill > 0 else None

    @property
    def decompressed_size(self) -> int | None:
        """The width to which semantic states of clips are decompressed, None if they are not."""
        return self.video_teacher_size if self.loss_weights.video_distill > 0 else None

    @property
    def num_held_out_clips(self) -> int:
        """How many clips are measured."""
        return max(1, self.num_held_out // self.images_per_clip)


@dataclass(frozen=True, kw_only=True)
class HydraStage(Stage):
    """Args:
    tasks: task -> samples of one optimizer step, over all processes and accumulation.
    loss_weights: the weight of each loss, see `HydraLossWeights`.
    task_weights: task -> factor on its losses, 1 by default. Two tasks of one head count twice: weights that add up to 1 keep
        the papers' L_NTP + L_FM.
    lora_rank: rank of adapters on the linear layers of `lora_targets` that `learning_rates` names; the weights of these layers
        are then frozen, and other modules trained in full. 0 trains everything in full.
    lora_targets: prefixes of the names of modules that get adapters.
    condition_grad_scale: factor on the gradient that reaches Sem-ViT through given images; 0.1 in UniMRG's code for a model
        with a shared encoder, 1 in HYDRA.
    drop_prompt: share of prompts replaced by the empty one, for guidance.
    sigma_shifts: task -> shift of its noise levels in training, instead of the model's own. A large one trains at high noise, where
        what is copied from a source is decided.
    image_size, clip_size: images, and frames of clips, have at most as many pixels as a square of this side, in the saved
        pipeline too; None leaves the sizes of the processor.
    """

    tasks: dict[str, int]
    loss_weights: HydraLossWeights | UnifiedLossWeights = field(default_factory=HydraLossWeights)
    task_weights: dict[str, float] = field(default_factory=dict)
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("model.language_model", "model.vision_tower.sem_vit")
    condition_grad_scale: float = 1.0
    drop_prompt: float = 0.1
    sigma_shifts: dict[str, float] = field(default_factory=dict)
    image_size: int | None = None
    clip_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            check_task(task, self.name)
        if min(self.image_size or 1, self.clip_size or 1) < 1 or 0 in (self.image_size, self.clip_size):
            raise ValueError(f"{self.name}: {self.image_size=} and {self.clip_size=} must be at least 1.")
        if wrong := {
            task: value for task, value in self.task_weights.items() if task not in self.tasks or not value >= 0
        }:
            raise ValueError(
                f"{self.name}: task_weights={wrong}, expected numbers of at least 0 for {list(self.tasks)}."
            )

        if wrong := {
            task: shift for task, shift in self.sigma_shifts.items() if task not in self.tasks or not shift > 0
        }:
            raise ValueError(f"{self.name}: sigma_shifts={wrong}, expected positive numbers for {list(self.tasks)}.")

    def loss_weight_of(self, task: str, loss: str) -> float:
        """The weight of a task's loss in the sum that is minimised."""
        return self.task_weights.get(task, 1.0) * getattr(self.loss_weights, loss)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages that follow each other.

    Args:
        data: data of every stage that has none of its own; a tuple of sources counts as `Sources`.
        init: folder or Hub id that the first stage starts from, such as `hydra convert` writes; None is new weights.
        micro_batch_size: samples that one process has in memory at once; None is its whole share of a batch.
        gradient_checkpointing: recompute activations rather than keep them.
        attn_implementation: that of the training run; it is not saved in the checkpoint.
        log_every, save_every, sample_every: steps from one log row, checkpoint or sample to the next.
        push_to: repo on the Hub that the run is uploaded to while it trains, and resumed from on another machine.
    """

    name: str
    config: HydraTokConfig | HydraConfig
    stages: tuple[Stage, ...]
    data: Data | tuple[Source, ...] | None = None
    seed: int = 0
    init: str | None = None
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000
    push_to: str | None = None

    def __post_init__(self):
        if min(self.log_every, self.save_every, self.sample_every) < 1:
            raise ValueError(
                f"{self.name}: {self.log_every=}, {self.save_every=} and {self.sample_every=} must be at least 1."
            )

    def data_of(self, stage: Stage) -> Data | None:
        """The stage's data, or the recipe's if it has none."""
        if stage.data is not None:
            return stage.data
        return Sources(self.data) if isinstance(self.data, tuple) else self.data

    def with_overrides(self, **overrides) -> "Recipe":
        """A recipe with the same change in every stage (such as `num_steps=10`). Raises ValueError for an unknown field."""
        known = {f.name for stage in self.stages for f in fields(stage)}
        if unknown := set(overrides) - known:
            raise ValueError(f"{self.name} has no {sorted(unknown)}; its stages have {sorted(known)}.")
        return replace(self, stages=tuple(replace(stage, **overrides) for stage in self.stages))


@dataclass(frozen=True, kw_only=True)
class HydraRecipe(Recipe):
    """Args:
    tokenizer: folder or Hub id of the trained HYDRA-TOK; None keeps that of `init`.
    processor: None only for a dry run without data.
    sample_prompts: prompts of the images that are generated while training; () takes those of the data.
    num_workers: processes that read ahead, for each process that trains; None takes the data's own number.
    max_length: most tokens of a sample, images included; longer ones are skipped and counted. None is the number of positions
        of the language model.
    micro_batch_tokens: tokens that one process has in memory at once, images included: samples are packed into rows without
        padding, with a row of each task in a micro step, and a step has as many micro steps as its samples need. None pads
        samples, and `micro_batch_size` applies.
    num_inference_steps, guidance_scale: defaults of the saved pipeline.
    """

    tokenizer: str | None
    processor: HydraProcessor | None
    sample_prompts: tuple[str, ...] = ()
    num_workers: int | None = None
    max_length: int | None = None
    micro_batch_tokens: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 4.5

    def __post_init__(self):
        super().__post_init__()
        limit = self.config.get_text_config().max_position_embeddings
        if self.max_length is not None and not 1 <= self.max_length <= limit:
            raise ValueError(
                f"{self.name}: max_length={self.max_length} must be 1 to {limit}, the positions of its model."
            )
        if self.micro_batch_tokens is not None:
            self._check_budget(self.max_length or limit)

    def _check_budget(self, max_length: int) -> None:
        if self.micro_batch_size is not None:
            raise ValueError(
                f"{self.name}: got micro_batch_size={self.micro_batch_size} and micro_batch_tokens={self.micro_batch_tokens},"
                " expected one of them."
            )
        num_tasks = max(len(stage.tasks) for stage in self.stages)
        if self.micro_batch_tokens < num_tasks * max_length:
            raise ValueError(
                f"{self.name}: micro_batch_tokens={self.micro_batch_tokens} must hold a sample of every task, up to"
                f" {num_tasks} x max_length={max_length}; lower max_length: longer samples are skipped and counted."
            )

    def sized_for(self, stage: HydraStage) -> "HydraRecipe":
        """The recipe with a processor of the stage's sizes."""
        if self.processor is None or stage.image_size is stage.clip_size is None:
            return self
        processor = deepcopy(self.processor)
        if stage.image_size is not None:
            limit_size(processor.image_processor, stage.image_size)
        if stage.clip_size is not None and processor.video_token is not None:
            limit_size(processor.video_processor, stage.clip_size)
        return replace(self, processor=processor)

    def num_workers_of(self, stage: HydraStage) -> int:
        """Processes that read ahead in a stage, for each process that trains."""
        return self.data_of(stage).num_workers if self.num_workers is None else self.num_workers


@dataclass(frozen=True, kw_only=True)
class UnifiedRecipe(HydraRecipe):
    """Another unified model, trained like HYDRA; it starts from `init`.

    Args:
        model_class: a class with `from_pretrained` and the contract `training.adapters.UnifiedModel`.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    tokenizer: str | None = None


def limit_size(processor: HydraImageProcessor, side: int) -> None:
    """Makes images, or frames, have at most as many pixels as a square of this side."""
    least = processor.size.min_pixels or processor.patch_size**2
    processor.size = SizeDict(min_pixels=min(least, side**2), max_pixels=side**2)


def freeze_unnamed(module: nn.Module, stage: Stage) -> None:
    """Freezes all parameters that `stage.learning_rates` does not name. Raises ValueError for a name that matches none."""
    names = [name for name, _ in module.named_parameters()]
    for prefix in stage.learning_rates:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"{stage.name}: learning_rates names {prefix!r}, but no parameter begins with it.")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(stage.learning_rate_of(name) > 0)


def largest_modules(model: nn.Module, holds: Callable[[str, nn.Parameter], bool]) -> list[str]:
    """Names of the largest modules that have parameters, all of which satisfy `holds(name, parameter)`."""
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.named_parameters(prefix=name))
        is_inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if parameters and not is_inside and all(holds(*parameter) for parameter in parameters):
            found.append(name)
    return found
