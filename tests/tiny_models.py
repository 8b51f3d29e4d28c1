"""Tiny models of the real classes with words for a language model."""

import copy

import torch
from transformers import AutoConfig

from hydra_hf.modeling.configuration_hydra import HydraConfig, HydraTokConfig, PixelFlowDecoderConfig, VisionHeadConfig
from hydra_hf.modeling.layers import ZeroLinear
from hydra_hf.modeling.modeling_hydra import HydraForConditionalGeneration


IMAGE_SIZE = 32
PATCH_SIZE = 8


def make_tok_config(**kwargs) -> HydraTokConfig:
    decoder = PixelFlowDecoderConfig(
        hidden_size=32, num_global_layers=1, num_flow_layers=2, num_attention_heads=2, intermediate_size=64,
        patch_size=PATCH_SIZE, num_inference_steps=2,
    )  # fmt: skip
    return HydraTokConfig(**{
        "hidden_size": 32, "num_gen_layers": 1, "num_sem_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "latent_channels": 4, "decoder_config": decoder,
        "initializer_range": 0.1, **kwargs,
    })  # fmt: skip


def make_config(tokenizer, text_model_type: str = "qwen2", **kwargs) -> HydraConfig:
    text_config = AutoConfig.for_model(
        text_model_type, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    head = VisionHeadConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    null_prompt = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    return HydraConfig(**{
        "text_config": text_config, "vision_config": make_tok_config(), "vision_head_config": head,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "null_prompt_ids": tokenizer(null_prompt)["input_ids"], "sigma_shift": 2.0, "initializer_range": 0.1, **kwargs,
    })  # fmt: skip


@torch.no_grad()
def make_model(config: HydraConfig, seed: int = 0) -> HydraForConditionalGeneration:
    """Zero-initialised projections get values too, or every velocity is 0 and every comparison holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HydraForConditionalGeneration(copy.deepcopy(config)).eval()
        for module in model.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.1)
                module.bias.normal_(std=0.1)
    return model
