"""The contract of vLLM-Omni's step-wise execution, by its own protocol and its own state, read from the two files that need no vLLM."""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from serving_runs import largest_difference

from hydra_hf import TINY
from hydra_hf.serving.vllm_omni import HydraOmniPipeline


FOLDER = os.environ.get("VLLM_OMNI")  # an unpacked wheel; installing it would replace transformers and diffusers
pytestmark = pytest.mark.skipif(FOLDER is None, reason="VLLM_OMNI names no unpacked wheel of vllm_omni")


def load(path: str) -> dict:
    """The names in a file of the wheel, run alone."""
    return runpy.run_path(str(Path(FOLDER) / "vllm_omni" / "diffusion" / path))


def state_of(index: int, prompt, **options):
    sampling = {
        "height": None,
        "width": None,
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "seed": index,
    } | options
    return load("worker/utils.py")["StepRequestState"](str(index), SimpleNamespace(**sampling), prompt)


def test_the_pipeline_follows_the_protocol_and_draws_what_hydra_draws(pipeline):
    omni = HydraOmniPipeline(od_config=SimpleNamespace(model=TINY, dtype=torch.float32))
    assert load("models/interface.py")["supports_step_execution"](omni)
    states = [
        state_of(0, "two apples"),
        state_of(1, {"prompt": "a cat", "negative_prompt": "a dog"}, height=64, width=96),
        state_of(2, "a red circle", guidance_scale=1.0, num_inference_steps=2),
    ]
    for state in states:
        omni.prepare_encode(state)
    active = list(states)
    while active:  # as the runner does
        velocity = omni.denoise_step(None, states=active)
        rows = velocity.split([len(state.latents) for state in active])
        for state, part in zip(active, rows, strict=True):
            omni.step_scheduler(state, part)
        active = [state for state in active if not state.denoise_completed]
    for state in states:
        prompt = state.prompt if isinstance(state.prompt, dict) else {"prompt": state.prompt}
        sampling, generator = state.sampling, torch.Generator().manual_seed(state.sampling.seed)
        expected = pipeline(
            **prompt, height=sampling.height, width=sampling.width, guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.num_inference_steps, generator=generator,
        ).images[0]  # fmt: skip
        drawn = omni.decode(state)
        assert isinstance(drawn, Image.Image)
        assert largest_difference(drawn, expected) <= 1
    assert omni.load_weights(()) == {name for name, _ in omni.named_parameters()}
