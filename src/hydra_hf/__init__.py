"""HYDRA-TOK and HYDRA for the Hugging Face libraries. Importing registers every Auto class; the rest is loaded on demand."""

import sys
from importlib import import_module
from pathlib import Path

from .version import __version__


if "hydra_hf_command" not in sys.modules:  # the command `hydra` prints its help without torch
    from .modeling import (
        HydraConfig,
        HydraForConditionalGeneration,
        HydraImageProcessor,
        HydraModel,
        HydraProcessor,
        HydraTokConfig,
        HydraTokForPreTraining,
        HydraTokModel,
        HydraVideoProcessor,
        PixelFlowDecoderConfig,
        PixelViTDecoderConfig,
        VisionHeadConfig,
    )
    from .registration import register

    register()


TINY = str(Path(__file__).parent / "assets" / "hydra-tiny")
"""The embedded checkpoint: a folder that `HydraPipeline.from_pretrained` opens."""

_LAZY = {
    "FlowMatchSDEScheduler": "hydra_hf.pipelines.scheduling_flow_match_sde",
    "HydraPipeline": "hydra_hf.pipelines.pipeline_hydra",
    "HydraReconstructionPipeline": "hydra_hf.pipelines.pipeline_hydra_reconstruction",
}


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module(_LAZY.get(name, "hydra_hf.modeling")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


__all__ = [
    "TINY",
    "FlowMatchSDEScheduler",
    "HydraConfig",
    "HydraForConditionalGeneration",
    "HydraImageProcessor",
    "HydraModel",
    "HydraPipeline",
    "HydraProcessor",
    "HydraReconstructionPipeline",
    "HydraTokConfig",
    "HydraTokForPreTraining",
    "HydraTokModel",
    "HydraVideoProcessor",
    "PixelFlowDecoderConfig",
    "PixelViTDecoderConfig",
    "VisionHeadConfig",
    "__version__",
]
