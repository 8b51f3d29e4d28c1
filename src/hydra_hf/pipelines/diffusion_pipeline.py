"""What the pipelines share: loading, saving, and a scheduler that leaves the noise levels to them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..hub import HUB_OPTIONS, check_model_name
from .arguments import check_path


SCHEDULER_OPTIONS = {
    "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip  # options that leave the noise levels to the pipeline
FLAT = {
    "model": "config.json", "vision_tower": "config.json", "processor": "processor_config.json",
    "image_processor": "preprocessor_config.json", "scheduler": "scheduler_config.json",
}  # fmt: skip  # a component without a folder of its own is next to model_index.json, where this file shows it


@dataclass
class HydraPipelineOutput(ImagePipelineOutput):
    """Generated images.

    Args:
        images: PIL images; as numpy (B, H, W, 3) or torch (B, 3, H, W) in [0, 1]; or latents.
        latents, log_probs: with a `FlowMatchSDEScheduler`, every step, (B, steps + 1, C, h, w) from the noise on, and (B, steps).
    """

    latents: Tensor | None = None
    log_probs: Tensor | None = None


@dataclass
class ClipPipelineOutput(BaseOutput):
    """Generated clips.

    Args:
        frames: a list of PIL images for each clip; as numpy (B, T, H, W, 3) or torch (B, T, 3, H, W) in [0, 1]; or latents.
        latents, log_probs: as in `HydraPipelineOutput`.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    latents: Tensor | None = None
    log_probs: Tensor | None = None


class HydraDiffusionPipeline(DiffusionPipeline):
    """What the pipelines share: loading and saving classes that diffusers does not ship."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As in diffusers. Raises ValueError if the name is neither a folder nor a repo id, or the folder is incomplete."""
        path = check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        components, _ = cls._get_signature_keys(cls)
        if os.path.isdir(path):
            expected = ["model_index.json", *sorted(set(components) - set(kwargs))]
            found = [
                name for name in expected if any(Path(path, file).exists() for file in (name, FLAT.get(name, name)))
            ]
            if missing := [name for name in expected if name not in found]:
                raise ValueError(f"{path!r} is not a {cls.__name__}: it has no {missing}, expected {expected}.")
        else:
            check_model_name(path)
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """The folder of a repo's snapshot; diffusers' own method refuses components of other libraries."""
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        components, _ = cls._get_signature_keys(cls)
        patterns = ["model_index.json", *(f"{name}/*" for name in components)]
        folder = snapshot_download(pretrained_model_name, allow_patterns=patterns, **options)
        if any(Path(folder, name).is_dir() for name in components):
            return folder
        options["revision"] = Path(folder).name  # the commit
        return snapshot_download(pretrained_model_name, ignore_patterns=["*/*"], **options)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As in diffusers; the classes of components are those that this class is written for, wherever its code is from."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, kind in get_type_hints(cls.__init__).items():
            if isinstance(config.get(name), list) and config[name][1] == kind.__name__:
                config[name] = [kind.__module__, kind.__name__]
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in diffusers. Raises ValueError if the model has adapters, which diffusers would leave out silently."""
        check_path("save_directory", save_directory)
        for name, component in self.components.items():
            if is_compiled_module(component):
                component = component._orig_mod
            if not isinstance(component, torch.nn.Module):
                continue
            if not isinstance(component, PreTrainedModel) or component._hf_peft_config_loaded:
                raise ValueError(
                    f"{name} is a {type(component).__name__} that holds adapters or is wrapped; its weights would not be"
                    f" saved. Expected a transformers model: merge first, as in model.merge_and_unload() of peft."
                )
        super().save_pretrained(save_directory, **kwargs)


def check_scheduler(scheduler) -> None:
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"Got a {type(scheduler).__name__} as scheduler, expected a FlowMatchEulerDiscreteScheduler: the noise levels"
            " are the pipeline's own."
        )
    options = {**scheduler.config, "shift": scheduler.shift}
    if changed := {name: options[name] for name, value in SCHEDULER_OPTIONS.items() if options[name] != value}:
        raise ValueError(
            f"Got a scheduler with {_joined(changed)}, expected {_joined({name: SCHEDULER_OPTIONS[name] for name in changed})}:"
            " the noise levels are the pipeline's own."
        )


def _joined(options: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
