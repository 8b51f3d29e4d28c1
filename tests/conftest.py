"""Tiny models of the real classes, shared by all tests. No test touches the network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import AddedToken
from transformers import AutoConfig

from hydra_hf.modeling.configuration_hydra import (
    HydraConfig,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
    VisionHeadConfig,
)
from hydra_hf.modeling.image_processing_hydra import HydraImageProcessor
from hydra_hf.modeling.layers import ZeroLinear
from hydra_hf.modeling.modeling_hydra import HydraForConditionalGeneration
from hydra_hf.modeling.processing_hydra import HydraProcessor
from hydra_hf.modeling.video_processing_hydra import HydraVideoProcessor
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer


IMAGE_SIZE = 32
PATCH_SIZE = 8
SENTENCES = ["a cat", "a red circle and two blue squares", "draw a dog left of a green star", "what is in the picture"]


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers have the cores


def pytest_collection_modifyitems(items) -> None:
    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_toy_tokenizer(SENTENCES, vocab_size=384)


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


@pytest.fixture(scope="session")
def tiny_tok_config() -> HydraTokConfig:
    return make_tok_config()


@pytest.fixture
def tiny_config(tiny_tokenizer) -> HydraConfig:
    return make_config(tiny_tokenizer)


@pytest.fixture
def tiny_model(tiny_config) -> HydraForConditionalGeneration:
    return make_model(tiny_config)


@pytest.fixture
def make_tiny_model(tiny_tokenizer):
    """A function that builds the tiny model with other fields of its config, or with another language model."""
    return lambda text_model_type="qwen2", **kwargs: make_model(make_config(tiny_tokenizer, text_model_type, **kwargs))


@pytest.fixture
def tiny_processor(tiny_tokenizer) -> HydraProcessor:
    image_processor = HydraImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, patch_size=PATCH_SIZE)
    return HydraProcessor(image_processor, copy.deepcopy(tiny_tokenizer), patch_size=PATCH_SIZE)


@pytest.fixture
def tiny_pipeline(tiny_model, tiny_processor) -> HydraPipeline:
    pipeline = HydraPipeline(
        tiny_model, tiny_processor, FlowMatchEulerDiscreteScheduler(),
        default_num_inference_steps=3, default_guidance_scale=3.0,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def clip_pipeline(tiny_tokenizer) -> HydraPipeline:
    """A pipeline that draws clips and edits images; it reads images of any size from 16 to 256 pixels in all."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken("<|video_pad|>", special=True, normalized=False)])
    decoder = PixelViTDecoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=PATCH_SIZE,
        temporal_unfold_layers=[0, 2],
    )  # fmt: skip
    vision_config = make_tok_config(decoder_config=decoder, temporal_fold_layers=[0, 0], rotary_axes=[4, 0, 0])
    video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    model = make_model(make_config(tokenizer, vision_config=vision_config, video_token_id=video_token_id))
    size = {"min_pixels": PATCH_SIZE**2, "max_pixels": 16 * PATCH_SIZE**2}
    processor = HydraProcessor(
        HydraImageProcessor(size=size, patch_size=PATCH_SIZE), tokenizer, patch_size=PATCH_SIZE,
        video_processor=HydraVideoProcessor(size=size, patch_size=PATCH_SIZE, num_frames=5),
    )  # fmt: skip
    pipeline = HydraPipeline(model, processor, FlowMatchEulerDiscreteScheduler(), default_num_inference_steps=3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
