"""Random models that fit the pictures of the toy world, for the tests of evaluation, training and command line."""

from functools import cache

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hydra_hf.modeling import (
    HydraConfig,
    HydraForConditionalGeneration,
    HydraProcessor,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
    VisionHeadConfig,
)
from hydra_hf.modeling.layers import ZeroLinear
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.clips import clip_corpus
from hydra_hf.toy.edits import edit_corpus
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.text_tokenizer import extend_toy_tokenizer, train_toy_tokenizer
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.recipes import tiny, tiny_x


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

VIDEO_TOK_CONFIG = HydraTokConfig(
    num_gen_layers=2, num_sem_layers=1, image_size=64, latent_channels=4, temporal_fold_layers=[0, 1],
    decoder_config=PixelViTDecoderConfig(num_hidden_layers=2, temporal_unfold_layers=[1, 2], **SIZES), **SIZES,
)  # fmt: skip


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


def toy_pipeline() -> HydraPipeline:
    return random_pipeline(toy_config(), toy_processor())


def toy_video_pipeline() -> HydraPipeline:
    """A model of images and clips that has the words of clips and edits."""
    config = toy_config()
    tokenizer = extend_toy_tokenizer(toy_tokenizer(), [*clip_corpus(), *edit_corpus()])
    config.text_config.vocab_size = len(tokenizer)
    config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    config.vision_config = HydraTokConfig.from_dict(VIDEO_TOK_CONFIG.to_dict())
    return random_pipeline(config, tiny_x.with_clips(toy_processor(), tokenizer, config))


@torch.no_grad()
def random_pipeline(config: HydraConfig, processor: HydraProcessor) -> HydraPipeline:
    """Random weights everywhere, or every picture would be the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HydraForConditionalGeneration(config).eval()
        for module in model.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.1)
    pipeline = HydraPipeline(
        model, processor, FlowMatchEulerDiscreteScheduler(),
        default_num_inference_steps=2, default_guidance_scale=1.0,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
