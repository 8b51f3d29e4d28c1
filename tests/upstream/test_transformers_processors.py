"""transformers' ProcessorTesterMixin and ImageProcessingTestMixin."""

import unittest

from suites import skips, suite

from hydra_hf import HydraImageProcessor, HydraProcessor
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer


processing = suite("transformers_tests.test_processing_common")
image_processing = suite("transformers_tests.test_image_processing_common")

SIZE = {"height": 28, "width": 28}
ONE_PATCH = {"height": 14, "width": 14}  # packed, a batch of such images has one row an image, as the suite expects


class HydraProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = HydraProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return train_toy_tokenizer(
            ["lower newer", "upper older longer string", "a dog, a bird and a picture"], vocab_size=384
        )

    @classmethod
    def _setup_image_processor(cls):
        return HydraImageProcessor(size=SIZE)


class ImageProcessorTester:
    """Pictures of 20 to 40 pixels."""

    batch_size = 3
    num_channels = 3
    min_resolution = 20
    max_resolution = 40

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_image_processor_dict(self):
        return {"size": ONE_PATCH}

    def expected_output_image_shape(self, images):
        return (self.num_channels * ONE_PATCH["height"] * ONE_PATCH["width"],)

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return image_processing.prepare_image_inputs(
            batch_size=self.batch_size, num_channels=self.num_channels, min_resolution=self.min_resolution,
            max_resolution=self.max_resolution, equal_resolution=equal_resolution, numpify=numpify, torchify=torchify,
        )  # fmt: skip


@skips({"test_call_numpy_4_channels": "`pixel_values` have three channels: a fourth is alpha, and is laid over white"})
class HydraImageProcessorTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessorTester
    image_processing_classes = {"torchvision": HydraImageProcessor}

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()
