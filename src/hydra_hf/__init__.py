"""HYDRA-TOK and HYDRA for the Hugging Face libraries. Importing registers every Auto class; the rest is loaded on demand."""

from importlib import import_module
from pathlib import Path

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
from .version import __version__


register()

TINY = str(Path(__file__).parent / "assets" / "hydra-tiny")
"""The embedded checkpoint: a folder that `HydraPipeline.from_pretrained` opens."""

_LAZY = {
    "HydraPipeline": "hydra_hf.pipelines.pipeline_hydra",
    "HydraReconstructionPipeline": "hydra_hf.pipelines.pipeline_hydra_reconstruction",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


__all__ = [
    "TINY",
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
