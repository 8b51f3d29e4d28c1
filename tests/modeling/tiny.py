"""The smallest models that still have every part; their weights are drawn by a seed."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from hydra_hf import (
    HydraConfig,
    HydraForConditionalGeneration,
    HydraTokConfig,
    HydraTokModel,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
)
from hydra_hf.modeling.layers import ZeroLinear
from hydra_hf.modeling.temporal import FrameLinear


IMAGE, START, END, VIDEO = 60, 61, 62, 63
PATCH = 4

_TEXT_CHANGES = {"qwen3": {"head_dim": 8}, "llama": {"attention_bias": True}}


def flow_decoder_config(**changes) -> PixelFlowDecoderConfig:
    sizes = {
        "hidden_size": 16,
        "num_global_layers": 1,
        "num_flow_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    return PixelFlowDecoderConfig(**{**sizes, **changes})


def tok_config(**changes) -> HydraTokConfig:
    sizes = {
        "hidden_size": 24,
        "num_gen_layers": 2,
        "num_sem_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 3 * PATCH,
        "patch_size": PATCH,
        "latent_channels": 6,
        "initializer_range": 0.2,
    }
    return HydraTokConfig(**{"decoder_config": flow_decoder_config(), **sizes, **changes})


def clip_config(folds: tuple[int, ...] = (0, 1), temporal_attention: str = "tubelet", **changes) -> HydraTokConfig:
    """HYDRA-XTok; a decoder of three layers unfolds in front of its second and in its head, or all at once in its head."""
    unfolds = [3, 3] if len(set(folds)) == 1 else [1, 3]
    decoder_config = PixelViTDecoderConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, patch_size=PATCH,
        temporal_unfold_layers=unfolds, temporal_attention=temporal_attention, rotary_axes=[4, 4, 4],
        initializer_range=0.2,
    )  # fmt: skip
    fields = {
        "temporal_fold_layers": list(folds),
        "temporal_attention": temporal_attention,
        "rotary_axes": [4, 2, 2],
        "use_bottleneck_layernorm": True,
        "use_cls_token": False,
        "decoder_config": decoder_config,
    }
    return tok_config(**{**fields, **changes})


def hydra_config(text: str = "qwen2", **changes) -> HydraConfig:
    text_config = AutoConfig.for_model(
        text,
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 64,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            **_TEXT_CHANGES.get(text, {}),
        },
    )
    parts = {
        "text_config": text_config,
        "vision_config": tok_config(),
        "vision_head_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "image_token_id": IMAGE,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "null_prompt_ids": [1, 2, START],
        "initializer_range": 0.2,
    }
    return HydraConfig(**{**parts, **changes})


@torch.no_grad()
def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights where training starts from zero or the identity; otherwise half of it would not be tested."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FrameLinear):
            module.weight.add_(0.2 * torch.randn(module.weight.shape, generator=generator))
        if isinstance(module, ZeroLinear):
            module.weight.copy_(0.2 * torch.randn(module.weight.shape, generator=generator))
            module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    return model


def tok_model(seed: int = 0, **changes) -> HydraTokModel:
    torch.manual_seed(seed)
    return randomized(HydraTokModel(tok_config(**changes)), seed).eval()


def clip_model(seed: int = 0, **changes) -> HydraTokModel:
    torch.manual_seed(seed)
    return randomized(HydraTokModel(clip_config(**changes)), seed).eval()


def hydra_model(text: str = "qwen2", seed: int = 0, attn_implementation: str = "sdpa", **changes):
    torch.manual_seed(seed)
    config = hydra_config(text, **changes)
    config._attn_implementation = attn_implementation
    return randomized(HydraForConditionalGeneration(config), seed).eval()


def clip_hydra_model(seed: int = 0, **changes):
    """HYDRA-X: a model of images and clips."""
    return hydra_model(seed=seed, vision_config=clip_config(), video_token_id=VIDEO, **changes)


def pictures(number: int, height: int = 2 * PATCH, width: int = 2 * PATCH, seed: int = 0) -> Tensor:
    """Pixels (number, 3, height, width) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(number, 3, height, width, generator=generator) - 1


def clips(number: int, num_frames: int = 9, height: int = 2 * PATCH, width: int = 2 * PATCH, seed: int = 0) -> Tensor:
    """Pixels (number, 3, num_frames, height, width) in [-1, 1]."""
    frames = pictures(number * num_frames, height, width, seed)
    return frames.unflatten(0, (number, num_frames)).transpose(1, 2)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequence(*parts: int | str, num_tokens: int = 5) -> list[int]:
    """Token ids; "image" and "video" stand for `num_tokens` placeholders between their marks."""
    ids, placeholders = [], {"image": IMAGE, "video": VIDEO}
    for part in parts:
        ids += [START, *[placeholders[part]] * num_tokens, END] if isinstance(part, str) else [part]
    return ids


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def in_one_row(rows: list[list[int]]) -> dict[str, Tensor]:
    """The rows behind each other, without padding."""
    lengths = torch.tensor(list(map(len, rows)))
    ids = torch.tensor([token for row in rows for token in row])
    return {"input_ids": ids[None], "document_ids": torch.arange(len(rows)).repeat_interleave(lengths)[None]}
