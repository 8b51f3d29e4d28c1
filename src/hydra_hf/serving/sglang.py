"""HYDRA as a pipeline of SGLang's diffusion runtime: its registration, and its three stages (prompts, denoising, decoding).

Written for SGLang 0.5.23 (`register_pipeline`, `ComposedPipelineBase`, `PipelineStage`), which imports this module in each of its
processes where SGLANG_EXTERNAL_MODEL_PACKAGE names it. Nothing else may import it, as it needs SGLang.
"""

from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby

import torch
from sglang.multimodal_gen.configs.pipeline_configs.base import ModelTaskType, PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import DataType, SamplingParams
from sglang.multimodal_gen.registry import register_pipeline
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage
from sglang.multimodal_gen.runtime.utils.precision_types import PRECISION_TO_TYPE
from torch import Tensor

from ..pipelines.pipeline_hydra import HydraPipeline
from .batching import DecodeBatch, StepBatch
from .jobs import Drawing, ImageRequest, denoise, prepare_image
from .work import Decode, Step


@dataclass
class HydraSamplingParams(SamplingParams):
    """What a request may set; what is None is the checkpoint's own default."""

    data_type: DataType = DataType.IMAGE
    negative_prompt: str = ""
    guidance_scale: float | None = None

    def _adjust(self, server_args) -> None:
        scale = self.guidance_scale
        super()._adjust(server_args)
        self.guidance_scale = scale  # SGLang turns None into 1, which is no guidance


@dataclass
class HydraPipelineConfig(PipelineConfig):
    """Text to image on one device; requests that wait are drawn together."""

    task_type: ModelTaskType = ModelTaskType.T2I

    def supports_native_grouped_requests(self) -> bool:
        return True

    def supports_disaggregation(self) -> bool:
        return False

    def validate_server_args(self, server_args) -> None:
        if server_args.num_gpus != 1:
            raise ValueError(f"num_gpus is {server_args.num_gpus}, expected 1: HYDRA is not split over devices.")


class HydraPromptStage(PipelineStage):
    """Runs the prompt of a request once for each of its images, which have consecutive seeds or those of a list."""

    def __init__(self, pipeline: HydraPipeline):
        super().__init__()
        self.pipeline = pipeline

    def forward(self, batch: Req, server_args) -> Req:
        config, seeds = self.pipeline.config, batch.seed
        if not isinstance(seeds, list):
            seeds = [seeds + index for index in range(batch.num_outputs_per_prompt)]
        batch.num_inference_steps = batch.num_inference_steps or config.default_num_inference_steps
        scale = config.default_guidance_scale if batch.guidance_scale is None else batch.guidance_scale
        drawings = [Drawing(batch.height, batch.width, batch.num_inference_steps, scale, seed) for seed in seeds]
        batch.extra["images"] = [
            prepare_image(self.pipeline, ImageRequest(batch.prompt, drawing, batch.negative_prompt or ""))
            for drawing in drawings
        ]
        return batch


class HydraDenoisingStage(PipelineStage):
    """Clean latents (B, N, C) of the B images of a request."""

    role_affinity = RoleType.DENOISER

    def __init__(self, pipeline: HydraPipeline):
        super().__init__()
        self.model, self.steps = pipeline.model, StepBatch(pipeline.model)

    def forward(self, batch: Req, server_args) -> Req:
        return self.run_grouped_requests([batch], server_args)[0]

    def run_grouped_requests(self, batches: list[Req], server_args) -> list[Req]:
        """Draws the images of all requests step by step, those that can share a forward in one."""
        jobs = [
            [denoise(self.model, branches, grid, batch.num_inference_steps, generator)
             for branches, grid, generator in batch.extra["images"]]
            for batch in batches
        ]  # fmt: skip
        latents = self._run([job for group in jobs for job in group])
        for batch, group in zip(batches, jobs):
            batch.latents = torch.stack([latents[job] for job in group])
        return batches

    def _run(self, jobs: list[Generator[Step, Tensor, Tensor]]) -> dict[Generator, Tensor]:
        running, finished = [(job, next(job)) for job in jobs], {}
        while running:
            after = []
            for _, group in groupby(sorted(running, key=self._kind), key=self._kind):
                together, works = zip(*group)
                for job, velocity in zip(together, self.steps.run(list(works))):
                    try:
                        after.append((job, job.send(velocity)))
                    except StopIteration as end:
                        finished[job] = end.value
            self.steps.forget([work for _, work in after])
            running = after
        return finished

    def _kind(self, running: tuple[Generator, Step]) -> str:
        return str(self.steps.key(running[1]))


class HydraDecodingStage(PipelineStage):
    """The images (B, 3, H, W) of a request, in [0, 1]."""

    role_affinity = RoleType.DECODER

    def __init__(self, pipeline: HydraPipeline):
        super().__init__()
        self.decoding = DecodeBatch(pipeline.model)

    def forward(self, batch: Req, server_args) -> OutputBatch:
        works = [
            Decode(latents, grid, generator)
            for latents, (_, grid, generator) in zip(batch.latents, batch.extra["images"])
        ]
        pixels = torch.stack(self.decoding.run(works)).float()
        return OutputBatch(output=(pixels / 2 + 0.5).clamp(0, 1), metrics=batch.metrics)


class HydraSGLangPipeline(ComposedPipelineBase):
    """What SGLang loads where model_index.json names `HydraPipeline`."""

    pipeline_name = "HydraPipeline"

    def load_modules(self, server_args, loaded_modules: dict | None = None) -> dict[str, torch.nn.Module]:
        dtype = PRECISION_TO_TYPE[server_args.pipeline_config.dit_precision]
        self.hydra = HydraPipeline.from_pretrained(self.model_path, dtype=dtype).to(get_local_torch_device())
        return {"model": self.hydra.model}

    def create_pipeline_stages(self, server_args) -> None:
        self.add_stages([stage(self.hydra) for stage in (HydraPromptStage, HydraDenoisingStage, HydraDecodingStage)])


register_pipeline(
    HydraSGLangPipeline,
    sampling_param_cls=HydraSamplingParams,
    pipeline_config_cls=HydraPipelineConfig,
    model_detectors=[lambda name: name == HydraSGLangPipeline.pipeline_name.lower()],
    overwrite=True,  # asked first: other models are found by a part of the path, "wan" in "/home/wang/" too
)
