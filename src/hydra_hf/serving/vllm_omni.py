"""HYDRA as a diffusion pipeline of vLLM-Omni: its registration, and the four methods of its step-wise execution.

Written for vLLM-Omni 0.30 (`SupportsStepExecution`, `register_diffusion_model`). Its requirements (transformers below 5.15, diffusers
0.40) exclude those of this package, so the two have not run together in one server.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ..modeling.flow import euler_step, inference_sigmas
from ..modeling.grid import noise_tokens, num_tokens
from ..pipelines.pipeline_hydra import HydraPipeline
from .batching import DecodeBatch, StepBatch
from .jobs import Drawing, ImageRequest, prepare_image
from .work import Decode, Step


def register() -> None:
    """Makes vLLM-Omni find the pipeline under `HydraPipeline`, the name in model_index.json; for its entry point group
    `vllm_omni.general_plugins`."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model("HydraPipeline", __name__, "HydraOmniPipeline")


class HydraOmniPipeline(nn.Module):
    """Text to image, a step of several requests at a time; latents are packed (N, C), as vLLM-Omni splits results by rows."""

    supports_step_execution = True
    weights_sources = ()  # from_pretrained reads the weights

    def __init__(self, *, od_config, prefix: str = ""):
        super().__init__()
        self.pipeline = HydraPipeline.from_pretrained(od_config.model, dtype=od_config.dtype)
        self.model = self.pipeline.model
        self.steps, self.decoding = StepBatch(self.model), DecodeBatch(self.model)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names of all parameters, which are loaded already."""
        return {name for name, _ in self.named_parameters()}

    @torch.no_grad()
    def prepare_encode(self, state, **kwargs):
        """Runs the prompts of a request, and gives it noise and its schedule."""
        sampling, config = state.sampling, self.pipeline.config
        prompt = state.prompt if isinstance(state.prompt, dict) else {"prompt": state.prompt or ""}
        steps = sampling.num_inference_steps or config.default_num_inference_steps
        scale = config.default_guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
        drawing = Drawing(sampling.height, sampling.width, steps, scale, sampling.seed or 0)
        request = ImageRequest(prompt["prompt"], drawing, prompt.get("negative_prompt") or "")
        branches, grid, generator = prepare_image(self.pipeline, request)
        sigmas = inference_sigmas(steps, self.model.get_sigma_shift(num_tokens(grid))).to(self.model.device)
        state.latents = noise_tokens([grid], self.model.config.vision_config.latent_channels, generator, sigmas.device)
        state.timesteps, state.step_index, state.do_true_cfg = 1000 * sigmas, 0, len(branches) > 1
        state.extra |= {
            "branches": branches, "grid": grid, "generator": generator, "sigmas": [*sigmas.tolist(), 0.0],
        }  # fmt: skip
        return state

    @torch.no_grad()
    def denoise_step(self, input_batch, *, states: Sequence | None = None, **kwargs) -> Tensor:
        """The velocity (total_tokens, C) of all states, one behind the other."""
        works = [
            Step(state.latents, state.extra["sigmas"][state.step_index], state.extra["branches"], state.extra["grid"])
            for state in states or input_batch.states
        ]
        velocities = {}
        for _, group in groupby(sorted(works, key=self._kind), key=self._kind):
            together = list(group)
            velocities |= zip(map(id, together), self.steps.run(together))
        self.steps.forget(works)
        return torch.cat([velocities[id(work)] for work in works])

    def _kind(self, work: Step) -> str:
        return str(self.steps.key(work))

    def step_scheduler(self, state, noise_pred: Tensor, **kwargs) -> None:
        """An Euler step."""
        sigma, next_sigma = state.extra["sigmas"][state.step_index :][:2]
        state.latents = euler_step(state.latents, noise_pred.float(), sigma, next_sigma)
        state.step_index += 1

    @torch.no_grad()
    def decode(self, state):
        """The finished image of a state."""
        (pixels,) = self.decoding.run([Decode(state.latents, state.extra["grid"], state.extra["generator"])])
        return self.pipeline.processor.image_processor.postprocess(pixels[None].float())[0]

    def post_decode(self, state, **kwargs):
        from vllm_omni.diffusion.data import DiffusionOutput

        return DiffusionOutput(output={"payload": {"image": self.decode(state)}, "metadata": {}})
