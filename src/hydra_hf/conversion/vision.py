"""Published ViTs as Gen-ViT and Sem-ViT: InternViT in three layouts, SigLIP2 in two. HYDRA, section 3.1; HYDRA-X, section 2."""

import math
from dataclasses import dataclass, field

from torch import Tensor
from transformers import AutoConfig

from hydra_hf.modeling import HydraTokConfig, PixelFlowDecoderConfig, PixelViTDecoderConfig
from hydra_hf.modeling.configuration_hydra import FLOW_DECODER_SIZES
from hydra_hf.modeling.temporal import fold_factors, widen_projection


PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.")  # of a ViT inside InternVL or SigLIP
BESIDE_INTERNVIT = ("model.language_model.", "language_model.", "lm_head.", "mlp1.", "model.multi_modal_projector.",
                    "multi_modal_projector.", "embeddings.mask_token")  # fmt: skip
BESIDE_SIGLIP = ("text_model.", "logit_scale", "logit_bias", "head.", "embeddings.position_ids")


@dataclass(frozen=True)
class VisionLayout:
    """How one family of checkpoints names the parameters of a ViT.

    Args:
        layers: the prefix of a layer's number.
        embeddings, layer: their name of a module or parameter -> this package's, in Gen-ViT's embeddings and in a layer.
        after: the same for what follows the layers, in Sem-ViT.
        ignored: prefixes of names that have no place in HYDRA-TOK.
    """

    layers: str
    embeddings: dict[str, str]
    layer: dict[str, str]
    ignored: tuple[str, ...]
    after: dict[str, str] = field(default_factory=dict)

    def rename(self, name: str, num_gen_layers: int) -> str | None:
        """This package's name of a parameter; one with "qkv" is three parameters. None if the layout does not know the name."""
        number, _, inside = name.removeprefix(self.layers).partition(".")
        if name.startswith(self.layers) and number.isdecimal():
            index = int(number)
            half = f"gen_vit.layers.{index}" if index < num_gen_layers else f"sem_vit.layers.{index - num_gen_layers}"
            return _renamed(inside, self.layer, half)
        return _renamed(name, self.embeddings, "gen_vit.embeddings") or _renamed(name, self.after, "sem_vit")


def _renamed(name: str, table: dict[str, str], owner: str) -> str | None:
    for theirs, ours in table.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return f"{owner}.{ours}{name.removeprefix(theirs)}"
    return None


INTERNVIT = VisionLayout(
    layers="encoder.layers.",
    embeddings={
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "position_embeddings",
        "embeddings.patch_embedding": "projection",
    },
    layer={
        "norm1": "layernorm_before",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out_proj",
        "ls1": "scale_1.weight",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "ls2": "scale_2.weight",
    },
    ignored=BESIDE_INTERNVIT,
)
INTERNVIT_TRANSFORMERS = VisionLayout(
    layers="encoder.layer.",
    embeddings={
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "position_embeddings",
        "embeddings.patch_embeddings.projection": "projection",
    },
    layer={
        "layernorm_before": "layernorm_before",
        "attention.q_proj": "attention.q_proj",
        "attention.k_proj": "attention.k_proj",
        "attention.v_proj": "attention.v_proj",
        "attention.projection_layer": "attention.out_proj",
        "lambda_1": "scale_1.weight",
        "layernorm_after": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "lambda_2": "scale_2.weight",
    },
    ignored=BESIDE_INTERNVIT,
)
INTERNVIT_TIMM = VisionLayout(
    layers="blocks.",
    embeddings={"cls_token": "cls_token", "pos_embed": "position_embeddings", "patch_embed.proj": "projection"},
    layer={"ls1.gamma": "scale_1.weight", "ls2.gamma": "scale_2.weight", **INTERNVIT.layer},
    ignored=(),
)
SIGLIP = VisionLayout(
    layers="encoder.layers.",
    embeddings={
        "embeddings.position_embedding.weight": "position_embeddings",
        "embeddings.patch_embedding": "projection",
    },
    layer={
        "layer_norm1": "layernorm_before",
        "self_attn.q_proj": "attention.q_proj",
        "self_attn.k_proj": "attention.k_proj",
        "self_attn.v_proj": "attention.v_proj",
        "self_attn.out_proj": "attention.out_proj",
        "layer_norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    after={"post_layernorm": "post_layernorm"},
    ignored=BESIDE_SIGLIP,
)

TIMM_ARCHITECTURE = "vit_intern300m_patch14_448"
LAYOUTS = {
    "intern_vit_6b": INTERNVIT,  # InternViT-300M uses this name too
    "internvl_chat": INTERNVIT,
    "internvl_vision": INTERNVIT_TRANSFORMERS,
    "internvl": INTERNVIT_TRANSFORMERS,
    TIMM_ARCHITECTURE: INTERNVIT_TIMM,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "siglip2": SIGLIP,
    "siglip2_vision_model": SIGLIP,
}


def vision_layout(source: dict) -> VisionLayout:
    """The layout of a checkpoint with the config.json `source`. Raises ValueError if it is not among `LAYOUTS`."""
    return LAYOUTS[_kind(source)]


def _kind(source: dict) -> str:
    kind = source.get("model_type") or source.get("architecture")  # timm's files name an architecture
    if kind not in LAYOUTS:
        raise ValueError(f"The vision model is of type {kind!r}, expected one of {list(LAYOUTS)}.")
    return kind


def convert_vision(
    name: str, value: Tensor, layout: VisionLayout, config: HydraTokConfig, owner: str = ""
) -> dict[str, Tensor] | None:
    """A source tensor under this package's name; {} if HYDRA-TOK does not need it, None if the name is unknown.

    `owner` is the prefix of the new names, for a tokenizer that is part of HYDRA.
    """
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith(layout.ignored):
        return {}
    ours = layout.rename(name, config.num_gen_layers)
    if ours is None:
        return None
    ours = f"{owner}{ours}"
    if "attention.qkv" in ours:
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3))
        return {ours.replace("qkv", part): tensor for part, tensor in parts}
    if ours.endswith("position_embeddings") and value.ndim == 2:
        value = value[None]  # (N, D) of an nn.Embedding
    patch = (config.patch_size, config.patch_size, config.num_channels)
    if ours.endswith("projection.weight") and value.ndim == 2 and value.shape[1] == math.prod(patch):
        value = value.unflatten(1, patch).permute(
            0, 3, 1, 2
        )  # the nn.Linear of naflex reads a patch with its channels last
    if ours.endswith("embeddings.projection.weight"):
        value = widen_projection(value, fold_factors(config.temporal_fold_layers).get(0, 1))
    return {ours: value}


def vision_config(
    source: dict, decoder: str | None = None, num_gen_layers: int | None = None, video: bool = False
) -> HydraTokConfig:
    """HYDRA-TOK of the ViT with the config.json `source`.

    Args:
        decoder: "S", "M" or "L": a flow decoder of that depth, as wide as the ViT (for InternViT-300M the paper's three).
            None is what the papers use with this ViT: S for InternViT; for SigLIP2 a ViT decoder of the encoder's size.
        num_gen_layers: None for half of the layers, rounded down.
        video: HYDRA-XTok, for images and clips, with a ViT decoder.

    Raises:
        ValueError: for another model, an unknown size, images or patches that are not square, a cut outside the layers, or
            a flow decoder for clips.
    """
    kind = _kind(source)
    fields = source.get("vision_config", source)
    if LAYOUTS[kind] is SIGLIP:
        sizes = _siglip_sizes("siglip2_vision_model" if kind.startswith("siglip2") else "siglip_vision_model", fields)
    elif kind == TIMM_ARCHITECTURE:
        sizes = _timm_sizes(source)
    else:
        sizes = _internvit_sizes(fields, LAYOUTS[kind])
    num_layers = sizes.pop("num_hidden_layers")
    num_gen_layers = num_layers // 2 if num_gen_layers is None else num_gen_layers
    if not 0 < num_gen_layers < num_layers:
        raise ValueError(f"{num_gen_layers=} must leave each half at least one of the ViT's {num_layers} layers.")
    if video and decoder is not None:
        raise ValueError(
            f"{decoder=} is a flow decoder, which has no frames; clips need the ViT decoder, the default."
        )
    if decoder is None and LAYOUTS[kind] is not SIGLIP and not video:
        decoder = "S"
    decoder_config = _decoder_config(decoder, sizes, num_layers)
    if video:
        sizes |= _video_fields(sizes, decoder_config, num_gen_layers)
    return HydraTokConfig(
        **sizes,
        num_gen_layers=num_gen_layers,
        num_sem_layers=num_layers - num_gen_layers,
        decoder_config=decoder_config,
    )


def _video_fields(sizes: dict, decoder_config: PixelViTDecoderConfig, num_gen_layers: int) -> dict:
    """Where HYDRA-XTok folds and turns, as in the preset; sets the fields of the decoder, too."""
    rotary_axes = 3 * [2 * (sizes["hidden_size"] // sizes["num_attention_heads"] // 6)]
    num_layers = decoder_config.num_hidden_layers
    decoder_config.temporal_unfold_layers = [num_layers // 2, num_layers]
    decoder_config.rotary_axes = rotary_axes
    return {
        "temporal_fold_layers": [0, (num_gen_layers + 1) // 2],
        "rotary_axes": rotary_axes,
        "use_bottleneck_layernorm": True,
    }


def _decoder_config(
    decoder: str | None, sizes: dict, num_layers: int
) -> PixelFlowDecoderConfig | PixelViTDecoderConfig:
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps", "patch_size", "num_channels")
    shared = {name: sizes[name] for name in names}
    if decoder is None:
        return PixelViTDecoderConfig(num_hidden_layers=num_layers, **shared)
    if decoder not in FLOW_DECODER_SIZES:
        raise ValueError(f"{decoder=} must be one of {list(FLOW_DECODER_SIZES)}.")
    num_global_layers, num_flow_layers = FLOW_DECODER_SIZES[decoder]
    return PixelFlowDecoderConfig(num_global_layers=num_global_layers, num_flow_layers=num_flow_layers, **shared)


COMMON_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                "layer_norm_eps", "num_channels")  # fmt: skip


def _internvit_sizes(fields: dict, layout: VisionLayout) -> dict:
    """InternViT's own files have every field; those of transformers leave out defaults."""
    if layout is INTERNVIT_TRANSFORMERS:
        fields = _with_defaults("internvl_vision", fields)
    fields = {"num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, **fields}
    if missing := [name for name in (*COMMON_SIZES, "image_size", "patch_size") if name not in fields]:
        raise ValueError(f"The config of the vision model has no {missing}.")
    return {
        **{name: fields[name] for name in COMMON_SIZES},
        "image_size": _side("image_size", fields["image_size"]),
        "patch_size": _side("patch_size", fields["patch_size"]),
    }


def _timm_sizes(source: dict) -> dict:
    """timm writes the architecture's name, and in `model_args` only what differs from it."""
    changes = source.get("model_args", {})
    hidden_size = changes.get("embed_dim", 1024)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": changes.get("depth", 24),
        "num_attention_heads": changes.get("num_heads", 16),
        "intermediate_size": int(hidden_size * changes.get("mlp_ratio", 4)),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "image_size": _side("img_size", changes.get("img_size", 448)),
        "patch_size": _side("patch_size", changes.get("patch_size", 14)),
    }


def _siglip_sizes(model_type: str, fields: dict) -> dict:
    """The naflex kind ("siglip2") has a number of patches instead of an image size, and interpolates its table bilinearly."""
    fields = _with_defaults(model_type, fields)
    patch_size = _side("patch_size", fields["patch_size"])
    is_naflex = model_type == "siglip2_vision_model"
    image_size = (
        math.isqrt(fields["num_patches"]) * patch_size if is_naflex else _side("image_size", fields["image_size"])
    )
    return {
        **{name: fields[name] for name in COMMON_SIZES},
        "image_size": image_size,
        "patch_size": patch_size,
        "position_interpolation": "bilinear" if is_naflex else "bicubic",
        "use_cls_token": False,
        "use_post_layernorm": True,
        "layer_scale_init_value": None,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _with_defaults(model_type: str, fields: dict) -> dict:
    fields = {name: value for name, value in fields.items() if name != "model_type"}
    return AutoConfig.for_model(model_type, **fields).to_dict()


def _side(name: str, value: int | list[int] | tuple[int, ...]) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"The vision model's {name}={value} must be square.")
    return sides.pop()
