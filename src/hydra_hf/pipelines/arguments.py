"""Checks of what callers pass. Each ValueError says what came and what was expected."""

import os
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor, nn

from ..modeling.configuration_hydra import HydraConfig
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor, check_unicode


def check_integer(name: str, value, maximum: int | None = None) -> int:
    """A positive integer, numpy's included, as Python's int. Raises ValueError for anything else."""
    too_large = maximum is not None and isinstance(value, Integral) and value > maximum
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1 or too_large:
        expected = "an integer of at least 1" + ("" if maximum is None else f" and at most {maximum}")
        raise ValueError(f"Got {name}={value!r:.100}, expected {expected}.")
    return int(value)


def check_number(name: str, value, low: float = 0, high: float = 1) -> float:
    """A number in [low, high], numpy's included, as Python's float. Raises ValueError for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:  # phrased so that NaN fails
        raise ValueError(f"Got {name}={value!r:.100}, expected a number from {low} to {high:g}.")
    return float(value)


def check_interval(name: str, value) -> None:
    """Raises ValueError for anything but (low, high) with 0 <= low <= high <= 1."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or not all(isinstance(end, Real) for end in value) or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"Got {name}={value!r:.100}, expected (low, high) with 0 <= low <= high <= 1.")


def check_path(name: str, value) -> str:
    """A path or a name as a string. Raises ValueError for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"Got {name}={value!r:.100}, expected a path or a name.")
    return os.fspath(value)


def check_choice(name: str, value, choices: Sequence) -> None:
    """Raises ValueError for a value that is not among `choices`."""
    if type(value) not in map(type, choices) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"Got {name}={value!r:.100}, expected {', '.join(others)} or {last}.")


def check_texts(name: str, value) -> list[str]:
    """One text or a list of at least one, as a list. Raises ValueError for anything else, and for text that is not valid Unicode."""
    is_list = isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value)
    if not isinstance(value, str) and not is_list:
        raise ValueError(f"Got {name}={value!r:.100}, expected a string or a list of at least one string.")
    texts = [value] if isinstance(value, str) else list(value)
    for text in texts:
        check_unicode(name, text)
    return texts


def check_generator(generator, num_images: int) -> torch.Generator | list[torch.Generator] | None:
    """None, one generator, or a list of one for each image. Raises ValueError for anything else, seeds included."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"Got generator={generator!r:.100}, expected a torch.Generator or a list of them; a seed goes in as"
            " torch.Generator().manual_seed(seed)."
        )
    if len(generator) != num_images:
        raise ValueError(f"Got {len(generator)} as generator, expected one, or one for each of {num_images} images.")
    return list(generator)


def check_tensor(name: str, value, shape: tuple[int, ...]) -> Tensor:
    """Finite floats of this shape from torch or numpy, as a torch tensor. Raises ValueError for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(np.array(value, dtype=np.float32))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor | np.ndarray) else type(value).__name__
        raise ValueError(f"Got {name} of type {kind}, expected floats as a torch tensor or a numpy array.")
    if tuple(value.shape) != shape:
        raise ValueError(f"Got {name} of shape {tuple(value.shape)}, expected {shape}.")
    if not value.isfinite().all():
        raise ValueError(f"Got {name} with values that are not finite, expected finite ones.")
    return value


def check_finite(name: str, value: Tensor) -> Tensor:
    """The value itself. Raises ValueError if what the model computed is not finite."""
    if not value.isfinite().all():
        raise ValueError(
            f"The {name} that the model computed are not finite: its weights are damaged, {value.dtype} is too narrow for"
            " them, or the guidance is too strong."
        )
    return value


def check_processor(model: HydraForConditionalGeneration, processor: HydraProcessor) -> None:
    """Raises ValueError if these are not a HYDRA model and its processor."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not isinstance(model.config, HydraConfig):
        raise ValueError(f"Got a {type(model).__name__} as model, expected a HydraForConditionalGeneration.")
    if not isinstance(processor, HydraProcessor):
        raise ValueError(f"Got a {type(processor).__name__} as processor, expected a HydraProcessor.")
    config, tokenizer = model.config, processor.tokenizer
    start, end = tokenizer.convert_tokens_to_ids([processor.vision_start_token, processor.vision_end_token])
    expected = {
        "image_token_id": (processor.image_token_id, config.image_token_id),
        "video_token_id": (processor.video_token_id, config.video_token_id),
        "vision_start_token_id": (start, config.vision_start_token_id),
        "vision_end_token_id": (end, config.vision_end_token_id),
        "null_prompt_ids": (tokenizer(processor.build_image_prompt("")).input_ids, config.null_prompt_ids),
        "patch_size": (processor.patch_size, config.vision_config.patch_size),
        "num_time_tokens": (processor.num_time_tokens, config.num_time_tokens),
    }
    for name, (given, needed) in expected.items():
        if given != needed:
            raise ValueError(
                f"The processor does not belong to the model: its {name} is {given}, expected {needed} as in the model's config."
            )
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The processor does not belong to the model: its tokenizer has {len(tokenizer)} tokens, expected at most the"
            f" {config.text_config.vocab_size} of the model's config."
        )
