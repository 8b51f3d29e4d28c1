"""Tiny models of the real classes, and a Hub on loopback, shared by all tests. No test touches the network."""

import os

import hub_server


os.environ["HF_ENDPOINT"] = hub_server.HUB.endpoint  # read by huggingface_hub when it is imported, like the next two
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import constants
from tokenizers import AddedToken

from hydra_hf.modeling.configuration_hydra import (
    HydraConfig,
    HydraTokConfig,
    PixelViTDecoderConfig,
)
from hydra_hf.modeling.image_processing_hydra import HydraImageProcessor
from hydra_hf.modeling.modeling_hydra import HydraForConditionalGeneration
from hydra_hf.modeling.processing_hydra import HydraProcessor
from hydra_hf.modeling.video_processing_hydra import HydraVideoProcessor
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from tiny_models import IMAGE_SIZE, PATCH_SIZE, make_config, make_model, make_tok_config


SENTENCES = ["a cat", "a red circle and two blue squares", "draw a dog left of a green star", "what is in the picture"]


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers have the cores


def pytest_collection_modifyitems(items) -> None:
    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> hub_server.HubServer:
    """An empty Hub, a cache of its own and the right token; the libraries' clients are online in this test."""
    hub_server.HUB.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    return hub_server.HUB


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_toy_tokenizer(SENTENCES, vocab_size=384)


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
