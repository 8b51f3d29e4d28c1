"""diffusers' mixins: for pipelines, and for autoencoders as far as they do not ask for its own model class."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from suites import skips, suite
from tiny import PATCH, hydra_config, pictures, randomized, tok_config

from hydra_hf import HydraForConditionalGeneration, HydraImageProcessor, HydraPipeline, HydraProcessor, HydraTokModel
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer


pipelines = suite("diffusers_tests.pipelines.testing_utils")
params = suite("diffusers_tests.pipelines.pipeline_params")
models = suite("diffusers_tests.models.testing_utils")
autoencoders = suite("diffusers_tests.models.autoencoders.testing_utils")

pytestmark = pytest.mark.filterwarnings("always::FutureWarning")  # the suite of an older commit says `torch_dtype`

SIZE = 3 * PATCH


NULL_PROMPT = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"


class PipelineConfig(pipelines.BasePipelineTesterConfig):
    pipeline_class = HydraPipeline
    required_input_params_in_call_signature = params.TEXT_TO_IMAGE_PARAMS - {
        "prompt_embeds", "negative_prompt_embeds", "cross_attention_kwargs",
    }  # fmt: skip
    batch_input_params = frozenset(["prompt"])
    callback_cfg_params = frozenset()
    output_shape = (3, SIZE, SIZE)

    def get_dummy_components(self):
        tokenizer = train_toy_tokenizer(["a photo of a cat", "very long"], vocab_size=384)
        ids = tokenizer.convert_tokens_to_ids
        config = hydra_config(
            text_config={**hydra_config().text_config.to_dict(), "vocab_size": len(tokenizer)},
            image_token_id=ids("<|image_pad|>"), vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"), null_prompt_ids=tokenizer(NULL_PROMPT)["input_ids"],
        )  # fmt: skip
        torch.manual_seed(0)
        processor = HydraProcessor(
            HydraImageProcessor(size={"height": SIZE, "width": SIZE}, patch_size=PATCH), tokenizer, patch_size=PATCH
        )
        return {
            "model": randomized(HydraForConditionalGeneration(config)).eval(),
            "processor": processor,
            "scheduler": FlowMatchEulerDiscreteScheduler(),
        }

    def get_dummy_inputs(self):
        return {
            "prompt": "a photo of a cat", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt",
            "generator": self.get_generator(0),
        }  # fmt: skip


class TestHydraPipeline(PipelineConfig, pipelines.PipelineTesterMixin):
    pass


class TestHydraPipelineMemory(PipelineConfig, pipelines.MemoryTesterMixin):
    pass


class TokConfig(models.BaseModelTesterConfig):
    model_class = HydraTokModel
    main_input_name = "pixel_values"
    output_shape = (9, 24)

    def get_init_dict(self):
        return {"config": tok_config()}

    def get_dummy_inputs(self):
        return {"pixel_values": pictures(2, SIZE, SIZE)}


@skips({
    "test_from_save_pretrained_variant": "file names of diffusers' ModelMixin; HydraTokModel saves as a model of transformers",
    "test_getattr_is_correct": "asks for diffusers' ConfigMixin",
    "test_sharded_checkpoints_with_parallel_loading": "the index file of diffusers' ModelMixin",
})  # fmt: skip
class TestHydraTokModel(TokConfig, models.ModelTesterMixin):
    pass


@skips(
    {
        "test_gradient_checkpointing*": "asks for an attribute of diffusers' ModelMixin; transformers' suite tests checkpointing"
    }
)
class TestHydraTokTraining(TokConfig, models.TrainingTesterMixin):
    pass


class TestHydraTokAutoencoder(TokConfig, autoencoders.AutoencoderTesterMixin):
    pass
