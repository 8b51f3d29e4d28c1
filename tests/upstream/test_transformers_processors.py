"""transformers' ProcessorTesterMixin, ImageProcessingTestMixin and VideoProcessingTestMixin."""

import json
import unittest

from suites import skips, suite

from hydra_hf import HydraImageProcessor, HydraProcessor, HydraVideoProcessor
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer


processing = suite("transformers_tests.test_processing_common")
image_processing = suite("transformers_tests.test_image_processing_common")
video_processing = suite("transformers_tests.test_video_processing_common")

SIZE = {"height": 28, "width": 28}
ONE_PATCH = {"height": 14, "width": 14}  # packed, a batch of such images has one row an image, as the suite expects


@skips({
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": "it gives a clip to a processor without video processor, which is an error",
    "test_model_input_names": "the same",
})  # fmt: skip
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


@skips({
    "test_processor_with_multiple_inputs": "the suite looks for an optional part among those that every processor has",
    "test_replacement_offsets": "the same",
    "test_processor_to_json_string": "it compares a part with its settings",
})  # fmt: skip
class HydraProcessorOfClipsTest(HydraProcessorTest):
    @staticmethod
    def prepare_processor_dict():
        video_processor = HydraVideoProcessor(size=SIZE, temporal_patch_size=1)  # clips of the suite have any length
        return {"video_processor": json.loads(video_processor.to_json_string())}


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


class VideoProcessorTester:
    """Clips of five frames of 20 to 40 pixels."""

    batch_size = 3
    num_frames = 5
    num_channels = 3

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return video_processing.prepare_video_inputs(
            batch_size=self.batch_size, num_frames=self.num_frames, num_channels=self.num_channels, min_resolution=20,
            max_resolution=40, equal_resolution=equal_resolution, return_tensors=return_tensors,
        )  # fmt: skip

    def expected_output_video_shape(self, videos):
        return (self.num_channels * ONE_PATCH["height"] * ONE_PATCH["width"],)


@skips({
    "test_call_numpy_4_channels": "`pixel_values_videos` have three channels: a fourth is alpha, and is laid over white",
    "test_video_processor_from_dict_with_kwargs": "it expects a size with a shortest edge",
    "test_call_sample_frames": "a clip has 1 + 4n frames, and a shorter one than asked for gives those that it has",
})  # fmt: skip
class HydraVideoProcessorTest(video_processing.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = HydraVideoProcessor
    test_cast_dtype = True
    video_processor_tester = VideoProcessorTester()
    video_processor_dict = {"size": ONE_PATCH}

    def assert_expected_videos_shape(self, encoded_videos, expected_output_video_shape, num_videos):
        """Packed, each frame is a patch."""
        num_patches = num_videos * self.video_processor_tester.num_frames
        assert tuple(encoded_videos.shape) == (num_patches, *expected_output_video_shape)
