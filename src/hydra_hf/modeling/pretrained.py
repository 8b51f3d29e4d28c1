"""What HYDRA and HYDRA-TOK share as models of transformers: how weights are loaded and attention is chosen."""

import logging
import shutil
from functools import wraps
from pathlib import Path

import torch
from torch import nn
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.modeling_utils import PreTrainedModel, is_local_dist_rank_0


IS_CODE_OF_A_REPO = __name__.startswith("transformers_modules.")  # copied from the Hub by `trust_remote_code=True`


class HydraPreTrainedMixin:
    """Goes before `PreTrainedModel` in the bases: makes weights that do not fit the config an error."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in transformers, except that no weight silently stays random.

        Missing weights are allowed with `output_loading_info`, `ignore_mismatched_sizes`, or None instead of a folder.

        Raises:
            ValueError: for weights that are missing, belong to layers that the config does not have, or are not finite.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )
        if not IS_CODE_OF_A_REPO:
            vars(model.config).pop("auto_map", None)  # of the repo's code, which a save would name without copying it
        if output_loading_info:
            return model, info
        if pretrained_model_name_or_path is not None and not ignore_mismatched_sizes:
            _check_keys(model, pretrained_model_name_or_path, info)
            _check_values(model, pretrained_model_name_or_path)
        return model

    @wraps(PreTrainedModel.save_pretrained)  # diffusers looks at its arguments
    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers. A repo's own code comes along, since the config names it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if IS_CODE_OF_A_REPO:
            for path in Path(__file__).parent.glob("[!_]*.py"):
                shutil.copyfile(path, Path(save_directory, path.name))

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """As in transformers, without its warning about parts that have a config but are plain modules, such as decoders."""
        transformers_logger = logging.getLogger("transformers.modeling_utils")
        transformers_logger.addFilter(_is_not_about_plain_modules)
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        finally:
            transformers_logger.removeFilter(_is_not_about_plain_modules)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: loading through a shim would mark the installed class and rewrite `auto_map` on the next save."""


def _is_not_about_plain_modules(record: logging.LogRecord) -> bool:
    return "without finding the associated sub-model" not in record.getMessage()


def _check_keys(model: nn.Module, name: str, info: dict) -> None:
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    base = model.base_model
    parts = [key.removeprefix("model.").split(".")[0] for key in others]
    surplus = [key for key, part in zip(others, parts) if hasattr(base, part) or hasattr(model, part)]
    if getattr(base, "pixel_decoder", True) is None:
        surplus = [
            key for key in surplus if "pixel_decoder" not in key
        ]  # an encoder may be loaded without its decoder
    if missing or surplus:
        raise ValueError(
            f"The weights in {str(name)!r} do not fit the config of {type(model).__name__}: {_list(missing)} missing,"
            f" {_list(others)} not expected. Load with output_loading_info=True to get the model anyway, with random"
            " values where weights are missing."
        )


def _list(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else "none"


def _check_values(model: nn.Module, name: str) -> None:
    if is_fsdp_enabled() and not is_local_dist_rank_0():
        return  # the first process has read the weights and sends them
    for key, tensor in model.state_dict().items():
        is_plain = type(tensor) is torch.Tensor and not tensor.is_meta  # neither quantised nor offloaded to disk
        if not is_plain or not tensor.is_floating_point() or not tensor.numel():
            continue
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"The weights in {str(name)!r} are damaged: {key} has values that are not finite.")
