"""The schema of a recipe: everything that decides the outcome of a run, as frozen values.

`learning_rates` maps a module to its rate; what is not named is frozen.
"""

from dataclasses import dataclass, field, fields, replace

from torch import nn

from hydra_hf.modeling import (
    HydraConfig,
    HydraProcessor,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
)


@dataclass(frozen=True, kw_only=True)
class TokenizerLossWeights:
    """HYDRA, section 3.3; `regression` is that of a ViT decoder, `flow` that of a flow decoder."""

    regression: float = 1.0
    flow: float = 1.0
    kl: float = 1e-4
    cosine: float = 1.0


@dataclass(frozen=True, kw_only=True)
class HydraLossWeights:
    """HYDRA, section 2.2: L = L_NTP + L_FM."""

    language: float = 1.0
    flow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Args:
        learning_rates: module -> AdamW's rate. A key is a prefix of parameter names; the longest that fits counts.
        muon_scale: matrices of hidden layers go to Muon at this multiple of the rate; 0 leaves all to AdamW.
        decay_share: share of the steps, at the end, over which the rate falls linearly to a twentieth.
    """

    name: str
    num_steps: int
    learning_rates: dict[str, float]
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
        """What every rate is multiplied by at `step`: warm-up, plateau, decay."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay_steps = max(1, round(self.decay_share * self.num_steps))
        return warmup * min(1.0, max(0.05, (self.num_steps - step) / decay_steps))


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(Stage):
    """Args:
    one_step_prob: share of samples at sigma = 1 exactly, where a one-step decode evaluates (our choice).
    """

    batch_size: int
    decoder_config: PixelFlowDecoderConfig | PixelViTDecoderConfig
    loss_weights: TokenizerLossWeights = field(default_factory=TokenizerLossWeights)
    one_step_prob: float = 0.1


@dataclass(frozen=True, kw_only=True)
class HydraStage(Stage):
    """Args:
    tasks: task -> samples in a batch; the ratios of the papers, times a batch size.
    max_objects: scenes of the toy world have at most so many objects (a curriculum).
    questions_per_image: turns of one conversation about one image.
    relation_weight: how much oftener a question of left, above or nearer is asked than one of another type.
    drop_prompt: share of prompts replaced by the empty one, for guidance.
    """

    tasks: dict[str, int]
    loss_weights: HydraLossWeights = field(default_factory=HydraLossWeights)
    max_objects: int = 4
    questions_per_image: int = 4
    relation_weight: int = 1
    drop_prompt: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages that follow each other, on the toy world of one difficulty.

    Args:
        attn_implementation: of the training run; it is not part of the checkpoint.
    """

    name: str
    config: HydraTokConfig | HydraConfig
    stages: tuple[Stage, ...]
    difficulty: int = 1
    seed: int = 0
    attn_implementation: str = "sdpa"
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000

    def with_overrides(self, **overrides) -> "Recipe":
        """A recipe with the same change in every stage (such as `num_steps=10`). ValueError for a field that is not there."""
        known = {f.name for stage in self.stages for f in fields(stage)}
        if unknown := set(overrides) - known:
            raise ValueError(f"{self.name} has no {sorted(unknown)}; its stages have {sorted(known)}.")
        return replace(self, stages=tuple(replace(stage, **overrides) for stage in self.stages))


@dataclass(frozen=True, kw_only=True)
class HydraRecipe(Recipe):
    """Args:
    tokenizer: folder or Hub id of the trained HYDRA-TOK.
    """

    tokenizer: str
    processor: HydraProcessor


def freeze_unnamed(module: nn.Module, stage: Stage) -> None:
    """Only the parameters that `stage.learning_rates` names are trained. ValueError for a name that fits none."""
    names = [name for name, _ in module.named_parameters()]
    for prefix in stage.learning_rates:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"{stage.name}: learning_rates names {prefix!r}, but no parameter begins with it.")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(stage.learning_rate_of(name) > 0)
