"""The plug-in for SGLang's diffusion runtime, by the wheel's own registry, base classes, requests and executor, on a CPU."""

import os
import sys

import pytest
import torch
from serving_runs import largest_difference
from torchvision.transforms.functional import to_pil_image

from hydra_hf import TINY


FOLDER = os.environ.get("SGLANG")  # an unpacked wheel; installing it would replace transformers and diffusers
pytestmark = pytest.mark.skipif(FOLDER is None, reason="SGLANG names no unpacked wheel of sglang")


@pytest.fixture(scope="module")
def server_args():
    """Options as SGLang itself completes them for the checkpoint, with the plug-in named in its own variable."""
    sys.path.insert(0, FOLDER)
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "hydra_hf.serving.sglang"
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    server_args = ServerArgs.from_kwargs(model_path=TINY, num_gpus=1, dit_precision="fp32")
    set_global_server_args(server_args)
    return server_args


@pytest.fixture(scope="module")
def served(server_args):
    from sglang.multimodal_gen.registry import get_model_info
    from sglang.multimodal_gen.runtime.pipelines_core.executors.sync_executor import SyncExecutor

    pipeline_class = get_model_info(TINY, backend="sglang").pipeline_cls
    return pipeline_class(TINY, server_args, executor=SyncExecutor(server_args))


def request(server_args, **options):
    """A request as SGLang's server makes it of what a user sent."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    return Req(sampling_params=SamplingParams.from_user_sampling_params_args(TINY, server_args, **options))


def assert_drawn(pipeline, output, seeds, **options):
    assert output.output.shape[0] == len(seeds)
    for pixels, seed in zip(output.output, seeds):
        expected = pipeline(generator=torch.Generator().manual_seed(seed), **options).images[0]
        assert largest_difference(to_pil_image(pixels), expected) <= 1


def test_sglang_finds_the_plug_in_by_the_name_in_model_index(server_args):
    from sglang.multimodal_gen.registry import get_model_info

    from hydra_hf.serving import sglang

    found = get_model_info(TINY, backend="sglang")
    assert found.pipeline_cls is sglang.HydraSGLangPipeline
    assert found.sampling_param_cls is sglang.HydraSamplingParams
    assert type(server_args.pipeline_config) is sglang.HydraPipelineConfig


def test_a_request_draws_what_hydra_draws(served, server_args, pipeline):
    options = {"prompt": "two apples", "num_inference_steps": 3}
    output = served.forward(request(server_args, seed=5, num_outputs_per_prompt=2, **options), server_args)
    assert_drawn(pipeline, output, [5, 6], **options)


def test_requests_of_any_sizes_and_steps_are_drawn_together(served, server_args, pipeline):
    requests = [
        {"prompt": "two apples", "num_inference_steps": 3},
        {"prompt": "a cat", "negative_prompt": "a dog", "height": 64, "width": 96, "num_inference_steps": 2},
        {"prompt": "a red circle", "guidance_scale": 1.0, "num_inference_steps": 2},
    ]
    made = [request(server_args, seed=seed, **options) for seed, options in enumerate(requests)]
    outputs = served.forward_batch(made, server_args)
    for seed, (output, options) in enumerate(zip(outputs, requests, strict=True)):
        assert_drawn(pipeline, output, [seed], **options)


def test_what_a_request_leaves_out_is_the_checkpoints_default(served, server_args):
    made = request(server_args, prompt="a cat")
    _, grid, _ = served.stages[0](made, server_args).extra["images"][0]
    assert made.num_inference_steps == served.hydra.config.default_num_inference_steps
    assert grid == served.hydra.get_grid(None, None)
    assert len(made.extra["images"][0][0]) == 2  # with and without the prompt: guided


def test_more_than_one_device_is_refused(server_args):
    server_args.num_gpus = 2
    with pytest.raises(ValueError, match="num_gpus is 2"):
        server_args.pipeline_config.validate_server_args(server_args)
    server_args.num_gpus = 1
