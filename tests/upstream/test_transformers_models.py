"""transformers' ModelTesterMixin and GenerationTesterMixin on HYDRA and HYDRA-TOK."""

import unittest

import pytest
import torch
from suites import COMMAND, skips, suite
from tiny import PATCH, hydra_config, tok_config

from hydra_hf import HydraForConditionalGeneration, HydraModel, HydraTokModel


common = suite("transformers_tests.test_modeling_common")
generation = suite("transformers_tests.generation.test_utils")


pytestmark = pytest.mark.filterwarnings("always::FutureWarning")  # the suite looks for some

IMAGE = 3  # low, since the suite shrinks vocabularies

HYDRA_SKIPS = {
    "test_training": "asks for a loss of the base model, which has none; the losses are tested with the model",
    "test_training_gradient_checkpointing*": "asks a gradient of every weight: an answer trains no decoder and no vision head",
    "test_can_load_ignoring_mismatched_shapes": "writes a number in each config field that ends in _std, image_std too",
}
TOK_SKIPS = {
    "test_can_load_ignoring_mismatched_shapes": "writes a number in each config field that ends in _std, image_std too",
    "test_inputs_embeds*": "pixels have no embedding table",
    "test_model_get_set_embeddings": "the input embedding is a convolution, not a table",
}


class HydraTester:
    """Two prompts with one picture of 2x2 patches each, after a time token."""

    batch_size = 2
    seq_length = 9
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_image_tokens = 5
    image_token_id = IMAGE
    pad_token_id = 0
    text_config = hydra_config().text_config.to_dict()

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        return hydra_config(
            text_config={**self.text_config, "tie_word_embeddings": False}, image_token_id=IMAGE,
            vision_start_token_id=1, vision_end_token_id=2, vision_config=tok_config(num_gen_layers=1, num_sem_layers=1),
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], 50) + 5
        input_ids[:, 1:6] = IMAGE
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, 2 * PATCH, 2 * PATCH]),
            "mm_token_type_ids": (input_ids == IMAGE).long(),
        }


@skips(HYDRA_SKIPS)
class HydraTest(common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (HydraModel, HydraForConditionalGeneration)
    _is_composite = True
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = HydraTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The mixin knows by name which models have a loss."""
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is HydraForConditionalGeneration:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        return inputs

    @unittest.skipIf(
        hasattr(generation.GenerationTesterMixin, "is_missing"), f"no GenerationTesterMixin: {COMMAND} says why"
    )
    def test_left_padding_compatibility(self):
        """The suite compares logits with and without padding; it pads the inputs that it knows, and the token types are added here."""
        _, inputs = self.prepare_config_and_inputs_for_generate()
        types = torch.nn.functional.pad((inputs["input_ids"] == IMAGE).long(), (32, 0))
        super().test_left_padding_compatibility(padded_custom_inputs={"mm_token_type_ids": types})


class HydraTokTester:
    batch_size = 2
    seq_length = 5  # Gen-ViT's: four patches and the class token
    is_training = False  # the losses need a decoder and a teacher: HydraTokForPreTraining
    hidden_size = 24
    num_hidden_layers = 2
    num_attention_heads = 3

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        return tok_config(num_gen_layers=1, num_sem_layers=1)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([self.batch_size, 3, 2 * PATCH, 2 * PATCH])}


@skips(TOK_SKIPS)
class HydraTokTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HydraTokModel,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = HydraTokTester(self)
