"""Configurations of HYDRA-TOK and HYDRA, with the papers' sizes as named presets."""

import math
from collections.abc import Iterable
from dataclasses import field
from numbers import Real

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compat import ConfigOfParts, SubConfigSpec


def _check_layers(name: str, config: PreTrainedConfig, multiple: int = 1) -> None:
    """Raises ValueError unless the heads divide the width and the activation exists."""
    _check_positive(name, config)
    if config.hidden_size % (config.num_attention_heads * multiple):
        raise ValueError(
            f"{name}: hidden_size={config.hidden_size} must be a multiple of {multiple} x {config.num_attention_heads} heads."
        )
    _check_choice(f"{name}: hidden_act", config.hidden_act, ACT2FN)


def _check_positive(name: str, config: PreTrainedConfig) -> None:
    sizes = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "latent_channels"}
    for field_name, value in config.to_dict().items():
        is_layers = field_name.startswith("num_") and field_name.endswith("_layers")
        if (field_name in sizes and value < 1) or (is_layers and value < 0):
            raise ValueError(f"{name}: {field_name}={value} must be at least {0 if is_layers else 1}.")


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {sorted(choices)}.")


def _check_temporal(name: str, config: PreTrainedConfig, layers: list[int], last_layer: int) -> None:
    """Folds or unfolds at layers that exist, an attention that exists and rotary axes that a head has room for."""
    if layers != sorted(layers) or any(not 0 <= layer <= last_layer for layer in layers):
        raise ValueError(f"{name}: {layers} must be layers from 0 to {last_layer}, in ascending order.")
    _check_choice(f"{name}: temporal_attention", config.temporal_attention, TEMPORAL_ATTENTION)
    axes, head_dim = config.rotary_axes, config.hidden_size // config.num_attention_heads
    if axes and (len(axes) != 3 or any(size < 0 or size % 2 for size in axes) or sum(axes) > head_dim):
        raise ValueError(
            f"{name}: rotary_axes={axes} must be none, or even numbers for frame, row and column, of {head_dim=} at most."
        )
    if head_dim % 2 and axes:
        raise ValueError(f"{name}: rotary_axes={axes} turn pairs of dimensions, but {head_dim=} is odd.")


def _check_language_model(config: PreTrainedConfig) -> None:
    """Checks what transformers checks only when the model is built. Raises ValueError."""
    _check_positive("text_config", config)
    values = config.to_dict()
    if values["num_attention_heads"] % values.get("num_key_value_heads", 1):
        raise ValueError(
            f"text_config: num_attention_heads={values['num_attention_heads']} must be a multiple of"
            f" num_key_value_heads={values['num_key_value_heads']}."
        )
    if "hidden_act" in values:
        _check_choice("text_config: hidden_act", values["hidden_act"], ACT2FN)
    rope = values.get("rope_parameters") or {}
    for parameters in (
        rope,
        *(value for value in rope.values() if isinstance(value, dict)),
    ):  # one for each kind of layer
        if "rope_type" in parameters:
            _check_choice("text_config: rope_type", parameters["rope_type"], {"default", *ROPE_INIT_FUNCTIONS})
        factor = parameters.get("factor", 1.0)
        if not isinstance(factor, Real) or not 1 <= factor < math.inf:
            raise ValueError(f"text_config: rope_parameters has {factor=}, expected a number of at least 1.")


def _check_dtype(name: str, dtype: object) -> None:
    if isinstance(dtype, str) and not isinstance(vars(torch).get(dtype), torch.dtype):
        raise ValueError(f"{name}: dtype={dtype!r} must be a type of torch, such as 'float32' or 'bfloat16'.")


class HydraPreTrainedConfig(ConfigOfParts):
    """Never marked for code upload: a checkpoint opened through a shim would rewrite its `auto_map` on saving."""

    def __post_init__(self, **kwargs):
        _check_dtype(type(self).__name__, self.dtype)
        for name in self.sub_configs:
            if isinstance(part := getattr(self, name), dict):
                _check_dtype(name, part.get("dtype"))
                if kind := DECODERS.get(part.get("model_type")):  # of this file, not of another repo's copy of it
                    setattr(self, name, kind.from_dict(part))
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        pass


@strict
class PixelFlowDecoderConfig(HydraPreTrainedConfig):
    """Per-patch AdaLN MLP that denoises pixels under globally attended conditions. HYDRA, section 3.2.

    The sizes S, M and L have exactly the paper's 144.26M, 240.85M and 358.44M parameters; the wiring is our choice.

    Args:
        prediction_type: whether the network predicts the clean pixels ("sample", our choice) or the "velocity" (the paper).
        num_inference_steps: Euler steps of `decode` by default; the paper has 1.
    """

    model_type = "hydra_pixel_flow_decoder"
    base_config_key = "decoder_config"

    hidden_size: int = 1024
    num_global_layers: int = 6
    num_flow_layers: int = 12
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | int | None = 1.0
    attention_dropout: float | int = 0.0
    patch_size: int = 14
    num_channels: int = 3
    prediction_type: str = "sample"
    num_inference_steps: int = 4
    initializer_range: float = 0.02

    def validate_architecture(self):
        super().validate_architecture()
        _check_layers("decoder_config", self)
        if self.hidden_size % 4:
            raise ValueError(f"decoder_config: {self.hidden_size=} must be a multiple of 4 for 2D sine positions.")
        if self.prediction_type not in ("velocity", "sample"):
            raise ValueError(f"{self.prediction_type=} must be 'velocity' or 'sample'.")
        if self.num_inference_steps < 1:
            raise ValueError(f"{self.num_inference_steps=} must be at least 1.")


@strict
class PixelViTDecoderConfig(HydraPreTrainedConfig):
    """A ViT that regresses the pixels of each patch. HYDRA-X, section 2.

    Args:
        temporal_unfold_layers: layers before which one frame of a clip becomes two, `num_hidden_layers` for the output
            projection; as many as the encoder's folds. Which layers is our choice.
        temporal_attention, rotary_axes: as in `HydraTokConfig`.
    """

    model_type = "hydra_pixel_vit_decoder"
    base_config_key = "decoder_config"

    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | int | None = None
    attention_dropout: float | int = 0.0
    patch_size: int = 14
    num_channels: int = 3
    temporal_unfold_layers: list[int] = field(default_factory=list)
    temporal_attention: str = "tubelet"
    rotary_axes: list[int] = field(default_factory=list)
    initializer_range: float = 0.02

    def validate_architecture(self):
        super().validate_architecture()
        _check_layers("decoder_config", self)
        _check_temporal("decoder_config", self, self.temporal_unfold_layers, self.num_hidden_layers)
        if self.hidden_size % 4:
            raise ValueError(f"decoder_config: {self.hidden_size=} must be a multiple of 4 for 2D sine positions.")


TEMPORAL_ATTENTION = ("tubelet", "causal", "full")
FLOW_DECODER_SIZES = {"S": (6, 12), "M": (12, 16), "L": (18, 24)}  # (global layers, flow layers)


DECODERS = {kind.model_type: kind for kind in (PixelFlowDecoderConfig, PixelViTDecoderConfig)}
for _kind in DECODERS.values():
    AutoConfig.register(_kind.model_type, _kind)


@strict
class HydraTokConfig(HydraPreTrainedConfig):
    """One ViT cut in two by a bottleneck of `latent_channels`. HYDRA, section 3; HYDRA-X, section 2.

    Args:
        temporal_fold_layers: layers of Gen-ViT before which two frames of a clip are merged into one, 0 for the patches; a
            layer listed twice merges four. Empty for HYDRA-TOK, which reads only images. Which layers is our choice.
        temporal_attention: what a frame of a clip attends to: itself and the frame before it ("tubelet"), itself and all
            frames before it ("causal"), or all frames ("full").
        rotary_axes: how many dimensions of each head are rotated by the frame, the row and the column, in addition to the
            position table (our choice); empty for no rotary positions. Rotation by row and column changes the attention of
            a converted ViT; with [24, 0, 0] its images start unchanged.
        use_bottleneck_layernorm: a LayerNorm before the bottleneck (our choice), for the large activations of SigLIP2.
        image_size: size for which the position table was learned; any multiple of `patch_size` works.
        position_interpolation: how that table is resized to other grids: "bicubic" (InternViT and SigLIP), or "bilinear"
            with antialias (SigLIP2 naflex).
        image_mean, image_std: statistics that the ViT expects of pixels in [0, 1]; callers always give [-1, 1].
        layer_scale_init_value: None for a ViT without layer scale.
        use_sem_positions: add positions to the input of Sem-ViT, through a projection that starts at zero, so that a
            converted ViT starts unchanged (our choice). False is the papers' literal form: only the latents say where a
            token is, and in pure noise Sem-ViT cannot tell one place from another.
        decoder_config: None for an encoder without a decoder.
        scaling_factor, shift_factor: read by diffusers; 1 and 0, since the latents are normalised already.
    """

    model_type = "hydra_tok"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "decoder_config": SubConfigSpec(config_class=AutoConfig, model_type="hydra_pixel_flow_decoder", optional=True)
    }

    hidden_size: int = 1024
    num_gen_layers: int = 12
    num_sem_layers: int = 12
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | int | None = 1.0
    attention_dropout: float | int = 0.0
    use_cls_token: bool = True
    use_post_layernorm: bool = False
    use_bottleneck_layernorm: bool = False
    temporal_fold_layers: list[int] = field(default_factory=list)
    temporal_attention: str = "tubelet"
    rotary_axes: list[int] = field(default_factory=list)
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    position_interpolation: str = "bicubic"
    use_sem_positions: bool = True
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    latent_channels: int = 64
    decoder_config: dict | PreTrainedConfig | None = None
    scaling_factor: float | int = 1.0
    shift_factor: float | int = 0.0
    initializer_range: float = 0.02

    @property
    def num_hidden_layers(self) -> int:
        return self.num_gen_layers + self.num_sem_layers

    @property
    def temporal_compression_ratio(self) -> int:
        """How many frames of a clip, after the first, are one latent frame."""
        return 2 ** len(self.temporal_fold_layers)

    def validate_architecture(self):
        super().validate_architecture()
        _check_layers("vision_config", self)
        if self.patch_size < 1:
            raise ValueError(f"vision_config: patch_size={self.patch_size} must be at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"{self.image_size=} must be a multiple of {self.patch_size=}.")
        if not all(0 < std < math.inf for std in self.image_std):
            raise ValueError(f"{self.image_std=} must be positive numbers.")
        if not len(self.image_mean) == len(self.image_std) == self.num_channels:
            raise ValueError(f"{self.image_mean=} and {self.image_std=} must have {self.num_channels=} numbers.")
        _check_temporal("vision_config", self, self.temporal_fold_layers, self.num_gen_layers - 1)
        self._check_unfolds()
        if self.position_interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"{self.position_interpolation=} must be 'bicubic' or 'bilinear'.")
        if self.decoder_config is not None and self.decoder_config.patch_size != self.patch_size:
            raise ValueError(f"{self.decoder_config.patch_size=} of the decoder must equal {self.patch_size=}.")

    def _check_unfolds(self) -> None:
        """Decoders give back the frames that the folds took; a flow decoder has images alone."""
        if self.decoder_config is None:
            return
        is_vit = isinstance(self.decoder_config, PixelViTDecoderConfig)
        unfolds = self.decoder_config.temporal_unfold_layers if is_vit else []
        if len(unfolds) != len(self.temporal_fold_layers):
            raise ValueError(
                f"{self.temporal_fold_layers=} need a {PixelViTDecoderConfig.model_type} decoder with as many"
                f" temporal_unfold_layers, got {unfolds} of a {self.decoder_config.model_type}."
            )

    @classmethod
    def internvit_300m(cls, decoder: str = "S", **kwargs) -> "HydraTokConfig":
        """InternViT-300M-448px-V2.5 cut 12 | 12, with the flow decoder of size "S", "M" or "L"."""
        if decoder not in FLOW_DECODER_SIZES:
            raise ValueError(f"{decoder=} must be one of {list(FLOW_DECODER_SIZES)}.")
        num_global_layers, num_flow_layers = FLOW_DECODER_SIZES[decoder]
        decoder_config = PixelFlowDecoderConfig(num_global_layers=num_global_layers, num_flow_layers=num_flow_layers)
        return cls(decoder_config=decoder_config, **kwargs)

    @classmethod
    def siglip2_so400m(cls, **kwargs) -> "HydraTokConfig":
        """SigLIP2-So400m/16 naflex cut 13 | 14 (our choice), with the ViT decoder of HYDRA-X unless `decoder_config` is given."""
        so400m = {
            "hidden_size": 1152, "num_gen_layers": 13, "num_sem_layers": 14, "num_attention_heads": 16, "intermediate_size": 4304,
            "hidden_act": "gelu_pytorch_tanh", "layer_scale_init_value": None, "use_cls_token": False, "use_post_layernorm": True,
            "image_size": 256, "patch_size": 16, "position_interpolation": "bilinear", "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "decoder_config": PixelViTDecoderConfig(patch_size=16),
        }  # fmt: skip
        return cls(**{**so400m, **kwargs})

    @classmethod
    def siglip2_so400m_video(cls, **kwargs) -> "HydraTokConfig":
        """HYDRA-XTok: the same for images and clips, two folds and 3D rotary positions. HYDRA-X, section 2."""
        video = {
            "temporal_fold_layers": [0, 7],
            "rotary_axes": [24, 24, 24],
            "use_bottleneck_layernorm": True,
            "decoder_config": PixelViTDecoderConfig(
                patch_size=16, temporal_unfold_layers=[13, 27], rotary_axes=[24, 24, 24]
            ),
        }
        return cls.siglip2_so400m(**{**video, **kwargs})


@strict
class VisionHeadConfig(HydraPreTrainedConfig):
    """AdaLN-Zero transformer from the LLM's states to the velocity of latents. HYDRA, section 2.2; the sizes are our choice.

    Args:
        use_latent_skip: the head also reads the noisy latents (our choice: otherwise the noise has to pass through Sem-ViT
            and the LLM, and much less is learnt). False is the papers' literal form.
    """

    model_type = "hydra_vision_head"
    base_config_key = "vision_head_config"

    hidden_size: int = 1536
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    use_latent_skip: bool = True

    def validate_architecture(self):
        super().validate_architecture()
        # Half of each head turns with the row and half with the column, in pairs.
        _check_layers("vision_head_config", self, multiple=4)


@strict
class HydraConfig(HydraPreTrainedConfig):
    """A decoder-only language model that reads and generates images through HYDRA-TOK. HYDRA, section 2.2.

    What the paper leaves open is a field here, and its default is our choice.

    Args:
        llm_visual_input: what the LLM reads of images: "semantic", the states of Sem-ViT (HYDRA-X, section 3), or "latent",
            those of the bottleneck.
        video_token_id: the placeholder of clips, <|video_pad|>; None for a model that reads and generates images alone.
        use_source_interaction: in edits, Sem-ViT encodes the target together with its sources (HYDRA-X); False encodes every
            image alone.
        use_time_token: put a token with the noise level in front of each image block.
        sigma_shift: shift of the noise levels; None is sqrt(N C / 4096), clamped to [3, 8], for N tokens of C channels.
        sigma_logit_std: standard deviation of the logit-normal noise levels in training; with 1, the noise levels of the
            sampler's first steps would hardly ever be trained.
        null_prompt_ids: ids of the empty prompt up to <|vision_start|>, for guidance in `generate`; Qwen2.5's by default.
    """

    model_type = "hydra"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(config_class=HydraTokConfig),
        "vision_head_config": SubConfigSpec(config_class=VisionHeadConfig),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vision_head_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655  # <|image_pad|>
    video_token_id: int | None = None
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    llm_visual_input: str = "semantic"
    use_source_interaction: bool = True
    use_time_token: bool = True
    sigma_shift: float | int | None = None
    sigma_logit_std: float | int = 1.6
    null_prompt_ids: list[int] = field(
        default_factory=lambda: [151644, 872, 198, 151645, 198, 151644, 77091, 198, 151652]
    )
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        try:
            super().__post_init__(**kwargs)
        except KeyError as error:  # what transformers raises if rope_parameters lack a field
            raise ValueError(f"text_config: {error.args[0]}") from error
        self.tie_word_embeddings = self.text_config.tie_word_embeddings  # the head reads the top-level flag alone

    @property
    def num_time_tokens(self) -> int:
        return int(self.use_time_token)

    def validate_architecture(self):
        super().validate_architecture()
        _check_language_model(self.text_config)
        if self.sigma_shift is not None and not 0 < self.sigma_shift < math.inf:
            raise ValueError(f"{self.sigma_shift=} must be a positive number, or None.")
        if not 0 < self.sigma_logit_std < math.inf:
            raise ValueError(f"{self.sigma_logit_std=} must be a positive number.")
        if self.llm_visual_input not in ("semantic", "latent"):
            raise ValueError(f"{self.llm_visual_input=} must be 'semantic' or 'latent'.")
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.text_config.vocab_size:
                raise ValueError(f"{name}={value} is outside {self.text_config.vocab_size=}.")

    @classmethod
    def hydra_1_5b(cls, decoder: str = "S", **kwargs) -> "HydraConfig":
        """Qwen2.5-1.5B-Instruct with InternViT-300M."""
        text = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "vocab_size": 151_936}
        return cls._from_qwen(text, True, decoder, **kwargs)

    @classmethod
    def hydra_7b(cls, decoder: str = "S", **kwargs) -> "HydraConfig":
        """Qwen2.5-7B-Instruct with InternViT-300M."""
        text = {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28, "vocab_size": 152_064}
        return cls._from_qwen(text, False, decoder, **kwargs)

    @classmethod
    def _from_qwen(cls, text: dict, tie_word_embeddings: bool, decoder: str, **kwargs) -> "HydraConfig":
        text_config = AutoConfig.for_model(
            "qwen2", num_hidden_layers=28, num_key_value_heads={1536: 2, 3584: 4}[text["hidden_size"]],
            max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=tie_word_embeddings, bos_token_id=151_643, eos_token_id=151_645, **text,
        )  # fmt: skip
        vision_config = HydraTokConfig.internvit_300m(decoder)
        return cls(**{"text_config": text_config, "vision_config": vision_config, **kwargs})

    @classmethod
    def hydra_x_1_5b(cls, **kwargs) -> "HydraConfig":
        """Qwen2.5-1.5B-Instruct with HYDRA-XTok on SigLIP2-So400m: images and clips. HYDRA-X."""
        return cls.hydra_1_5b(**{**cls._of_hydra_x(), **kwargs})

    @classmethod
    def hydra_x_7b(cls, **kwargs) -> "HydraConfig":
        """Qwen2.5-7B-Instruct with HYDRA-XTok on SigLIP2-So400m: images and clips. HYDRA-X."""
        return cls.hydra_7b(**{**cls._of_hydra_x(), **kwargs})

    @staticmethod
    def _of_hydra_x() -> dict:
        return {"vision_config": HydraTokConfig.siglip2_so400m_video(), "video_token_id": 151_656}  # <|video_pad|>


__all__ = ["HydraConfig", "HydraTokConfig", "PixelFlowDecoderConfig", "PixelViTDecoderConfig", "VisionHeadConfig"]
