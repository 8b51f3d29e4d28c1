"""Random models that fit the pictures of the toy world, for the tests of evaluation, training and command line."""

from functools import cache

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hydra_hf.modeling import (
    HydraConfig,
    HydraForConditionalGeneration,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    VisionHeadConfig,
)
from hydra_hf.modeling.layers import ZeroLinear
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.recipes import tiny


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "initializer_range": 0.1,
}
FLOW_DECODER = PixelFlowDecoderConfig(num_global_layers=1, num_flow_layers=1, **SIZES)
TOK_CONFIG = HydraTokConfig(
    num_gen_layers=1, num_sem_layers=1, image_size=64, latent_channels=4, decoder_config=FLOW_DECODER, **SIZES
)


@cache
def toy_language() -> ToyLanguage:
    return ToyLanguage(ToyWorld(1))


@cache
def toy_tokenizer():
    return train_toy_tokenizer(toy_language().corpus())


def toy_config() -> HydraConfig:
    config = tiny.hydra_config(HydraTokConfig.from_dict(TOK_CONFIG.to_dict()), toy_tokenizer()).to_dict()
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                              "num_key_value_heads": 2, "layer_types": None, "initializer_range": 0.1}  # fmt: skip
    head = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["vision_head_config"] = VisionHeadConfig(**head).to_dict()
    return HydraConfig.from_dict({**config, "initializer_range": 0.1})


def toy_processor():
    return tiny.processor(TOK_CONFIG, toy_tokenizer(), toy_language().known_words)


@torch.no_grad()
def toy_pipeline() -> HydraPipeline:
    """Random weights everywhere, or every picture would be the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HydraForConditionalGeneration(toy_config()).eval()
        for module in model.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.1)
    pipeline = HydraPipeline(
        model, toy_processor(), FlowMatchEulerDiscreteScheduler(),
        default_num_inference_steps=2, default_guidance_scale=1.0,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
