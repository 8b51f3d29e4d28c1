"""Small random checkpoints of every kind that `convert` reads, in folders, and what their own classes compute."""

import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2Config,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)


States = Callable[[Tensor], list[Tensor]]
"""Pixels (B, 3, H, W) in the ViT's statistics -> the embeddings, every layer, and the last norm where there is one."""

PATCH, GRID, NUM_LAYERS = 8, 4, 5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 1}
SIGLIP_TEXT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
INTERNVIT = {**SIZES, "image_size": [GRID * PATCH] * 2, "patch_size": [PATCH] * 2, "attention_bias": True}
SIGLIP = {**SIZES, "image_size": GRID * PATCH, "patch_size": PATCH}
NAFLEX = {**SIZES, "num_patches": GRID**2, "patch_size": PATCH}
ORIGINAL_CONFIG = {**SIZES, "model_type": "intern_vit_6b", "image_size": GRID * PATCH, "patch_size": PATCH,
                   "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "qk_normalization": False}  # fmt: skip


@torch.no_grad()
def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


# InternViT


def internvl_vision(folder: Path) -> States:
    model = randomized(InternVLVisionModel(InternVLVisionConfig(**INTERNVIT)))
    model.save_pretrained(folder)
    return lambda pixels: list(model(pixels, output_hidden_states=True).hidden_states)


def internvl(folder: Path) -> States:
    config = InternVLConfig(vision_config=INTERNVIT, text_config=Qwen2Config(**TEXT).to_dict())
    model = randomized(InternVLForConditionalGeneration(config))
    model.save_pretrained(folder)
    return lambda pixels: list(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states)


def internvl_by_parameter_names(folder: Path) -> States:
    """The same under the names of its parameters, as other tools than transformers save it."""
    states = internvl(folder)
    config = InternVLConfig(vision_config=INTERNVIT, text_config=Qwen2Config(**TEXT).to_dict())
    model = randomized(InternVLForConditionalGeneration(config))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    assert "model.vision_tower.embeddings.cls_token" in tensors
    save_file(tensors, folder / "model.safetensors")
    return states


def timm_model():
    changes = {"embed_dim": 32, "depth": NUM_LAYERS, "num_heads": 2, "mlp_ratio": 1.5, "patch_size": PATCH}
    return randomized(timm.create_model("vit_intern300m_patch14_448.ogvl_2pt5", img_size=GRID * PATCH, **changes))


def timm_states(model) -> States:
    def states(pixels: Tensor) -> list[Tensor]:
        walked = [model._pos_embed(model.patch_embed(pixels))]
        for block in model.blocks:
            walked.append(block(walked[-1]))
        return walked

    return states


def timm_internvit(folder: Path) -> States:
    model = timm_model()
    save_for_hf(model, folder, safe_serialization=True)
    return timm_states(model)


ORIGINAL_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    ".gamma": "",
}


def original_tensors(model) -> dict[str, Tensor]:
    """timm's parameters, whose queries, keys and values are fused, by the names of the original code."""
    tensors = {}
    for name, value in model.state_dict().items():
        for theirs, original in ORIGINAL_NAMES.items():
            name = name.replace(theirs, original)
        tensors[name] = value
    return tensors


def intern_vit(folder: Path) -> States:
    model = timm_model()
    write(folder, ORIGINAL_CONFIG, original_tensors(model))
    return timm_states(model)


def internvl_chat(folder: Path) -> States:
    model = timm_model()
    tensors = {f"vision_model.{name}": value for name, value in original_tensors(model).items()}
    beside = {"language_model.model.norm.weight": torch.ones(3), "language_model.lm_head.weight": torch.ones(3),
              "mlp1.0.weight": torch.ones(3)}  # fmt: skip
    write(folder, {"model_type": "internvl_chat", "vision_config": ORIGINAL_CONFIG}, {**tensors, **beside})
    return timm_states(model)


# SigLIP


def siglip_states(model) -> States:
    def states(pixels: Tensor) -> list[Tensor]:
        output = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        return [*output.hidden_states, output.last_hidden_state]

    return states


def siglip_vision(folder: Path) -> States:
    model = randomized(SiglipVisionModel(SiglipVisionConfig(**SIGLIP)))
    model.save_pretrained(folder)
    return siglip_states(model)


def siglip_vision_of_old_files(folder: Path) -> States:
    """With a prefix and without the attention pooling."""
    model = randomized(SiglipVisionModel(SiglipVisionConfig(**SIGLIP, vision_use_head=False)))
    model.save_pretrained(folder)
    tensors = {f"vision_model.{name}": value.clone() for name, value in model.state_dict().items()}
    save_file({**tensors, "vision_model.embeddings.position_ids": torch.arange(16)}, folder / "model.safetensors")
    return siglip_states(model)


def siglip(folder: Path) -> States:
    model = randomized(SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config=SIGLIP_TEXT)))
    model.save_pretrained(folder)
    return siglip_states(model.vision_model)


def naflex_states(model) -> States:
    def states(pixels: Tensor) -> list[Tensor]:
        grid = [side // PATCH for side in pixels.shape[-2:]]
        patches = pixels.unflatten(3, (grid[1], PATCH)).unflatten(2, (grid[0], PATCH))  # (B, 3, h, p, w, p)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p p 3)
        output = model(
            patches,
            torch.ones(patches.shape[:2], dtype=torch.long),
            torch.tensor([grid] * len(pixels)),
            output_hidden_states=True,
        )
        return [*output.hidden_states, output.last_hidden_state]

    return states


def siglip2_vision(folder: Path) -> States:
    model = randomized(Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)))
    model.save_pretrained(folder)
    return naflex_states(model)


def siglip2(folder: Path) -> States:
    model = randomized(Siglip2Model(Siglip2Config(vision_config=NAFLEX, text_config=SIGLIP_TEXT)))
    model.save_pretrained(folder)
    return naflex_states(model.vision_model)


ANY_GRID = (internvl_vision, internvl, internvl_by_parameter_names, siglip_vision, siglip_vision_of_old_files, siglip,
            siglip2_vision, siglip2)  # fmt: skip
OWN_GRID = (timm_internvit, intern_vit, internvl_chat)  # timm bends its table with antialias, the original does not


# Language models


def language_model(folder: Path, tokenizer, model_type: str = "qwen2", **changes):
    """A random causal language model and its tokenizer, saved; the embedding is larger than the vocabulary, as Qwen's."""
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer) + 3, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **{**sizes, **changes},
    )  # fmt: skip
    model = randomized(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
