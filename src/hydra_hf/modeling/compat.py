"""What differs between the supported versions of transformers, in one place; the oldest and the newest are in setup.cfg.

Inside this package a cache of keys and values is `cache`, as in transformers 5.24. Up to 5.23 it is `past_key_values`, in the
arguments of forwards and in the fields of outputs. `CACHE` is the installed library's name for it, for calls to the library.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps

import torch
from torch import Tensor
from transformers import AutoConfig, configuration_utils, generation, modeling_utils
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import output_capturing


CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""The library's name for recomputing activations: an argument of TrainingArguments."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, whichever of its two names was used. Raises ValueError for both at once; warns if the old name is deprecated."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Got both cache and past_key_values, expected one: they are two names of one argument.")
    if past_key_values is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated, use `cache`.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool | None = None) -> None:
    """Makes `model` recompute its activations rather than keep them; None leaves `use_reentrant` to the library."""
    options = {} if use_reentrant is None else {f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
    getattr(model, f"{CHECKPOINTING}_enable")(**options)


if hasattr(modeling_utils, "slice_logits_to_keep"):  # since 5.21
    slice_logits_to_keep = modeling_utils.slice_logits_to_keep
else:

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Hidden states (B, L, D) of the last `logits_to_keep` positions, of all for 0, or of those in a tensor of positions."""
        if isinstance(logits_to_keep, Tensor):
            return hidden_states[:, logits_to_keep]
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states


if hasattr(configuration_utils, "SubConfigSpec"):  # since 5.20
    SubConfigSpec = configuration_utils.SubConfigSpec

    class ConfigOfParts(PreTrainedConfig):
        """A config that has other configs in its fields, as `sub_configs_defaults` says."""

else:

    @dataclass
    class SubConfigSpec:
        """A part's class, or AutoConfig and its model type by default; an optional part may be None."""

        config_class: type
        model_type: str = ""
        optional: bool = False

        def create(self, value: PreTrainedConfig | dict | None) -> PreTrainedConfig | None:
            if isinstance(value, PreTrainedConfig) or (value is None and self.optional):
                return value
            values = dict(value or {})
            if self.config_class is AutoConfig:
                return AutoConfig.for_model(values.pop("model_type", self.model_type), **values)
            return self.config_class(**values)

    class ConfigOfParts(PreTrainedConfig):
        """A config that has other configs in its fields, as `sub_configs_defaults` says."""

        sub_configs_defaults = {}

        def __init_subclass__(cls, *args, **kwargs):
            super().__init_subclass__(*args, **kwargs)
            cls.sub_configs = {name: spec.config_class for name, spec in cls.sub_configs_defaults.items()}

        def __post_init__(self, **kwargs):
            for name, spec in self.sub_configs_defaults.items():
                setattr(self, name, spec.create(getattr(self, name)))
            super().__post_init__(**kwargs)


if hasattr(output_capturing, "selected_hidden_states"):  # since 5.23
    capture_outputs = output_capturing.capture_outputs
else:

    def capture_outputs(**options) -> Callable:
        """The library's decorator, with `output_hidden_states` as the indices to keep, from either end."""

        def decorate(forward: Callable) -> Callable:
            captured = output_capturing.capture_outputs(**options)(forward)

            @wraps(forward)
            def wrapper(self, *args, output_hidden_states=None, return_dict=None, **kwargs):
                if output_hidden_states is None or isinstance(output_hidden_states, bool):
                    flags = {"output_hidden_states": output_hidden_states, "return_dict": return_dict}
                    flags = {name: flag for name, flag in flags.items() if flag is not None}
                    return captured(self, *args, **flags, **kwargs)
                outputs = captured(self, *args, output_hidden_states=True, return_dict=True, **kwargs)
                outputs["hidden_states"] = _selected(outputs.hidden_states, output_hidden_states)
                as_dict = self.config.return_dict if return_dict is None else return_dict
                return outputs if as_dict else outputs.to_tuple()

            return wrapper

        return decorate

    def _selected(states: tuple[Tensor, ...], selection: int | list[int]) -> tuple[Tensor | None, ...]:
        indices = [selection] if isinstance(selection, int) else selection
        kept = {range(len(states))[index] for index in indices if -len(states) <= index < len(states)}
        return tuple(state if index in kept else None for index, state in enumerate(states))


if hasattr(ProcessorMixin, "return_mm_token_type_ids"):  # since 5.23, an attribute of the processor
    TypedProcessingKwargs = ProcessingKwargs
else:

    class TypedProcessingKwargs(ProcessingKwargs, total=False):
        """The arguments of a processor, which returns `mm_token_type_ids` by default."""

        _defaults = {"text_kwargs": {"return_mm_token_type_ids": True}}


if hasattr(ProcessorMixin, "return_mm_token_type_ids"):  # since 5.23, when `generate` too began to use these
    GenerationMixin = generation.GenerationMixin
else:

    class GenerationMixin(generation.GenerationMixin):
        """The library's mixin, corrected for images: their blocks in the masks of static caches, their order in several
        answers."""

        def prepare_inputs_for_generation(self, input_ids, mm_token_type_ids=None, attention_mask=None, **kwargs):
            inputs = super().prepare_inputs_for_generation(
                input_ids, mm_token_type_ids=mm_token_type_ids, attention_mask=attention_mask, **kwargs
            )
            made_here = inputs.get("attention_mask")
            if mm_token_type_ids is not None and made_here is not attention_mask:  # made without the images
                ids, embeds = inputs["input_ids"], inputs.get("inputs_embeds")
                batch_size, length = (ids if ids is not None else embeds).shape[:2]
                inputs["attention_mask"] = self.create_masks_for_generate(
                    self.config, torch.empty(batch_size, length, 0, dtype=self.dtype, device=self.device),
                    attention_mask, inputs.get("past_key_values"), inputs.get("position_ids"), mm_token_type_ids,
                )  # fmt: skip
            return inputs

        def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
            """Every answer gets all images of its row: [A, B] becomes [A, B, A, B], where 5.18 gives [A, A, B, B]."""
            ids = input_ids if input_ids is not None and input_ids.numel() else None  # empty next to embeddings
            for number, kind in enumerate(("image", "video"), start=1):
                if (outputs := mm_encoder_output.get(kind)) is None:
                    continue
                embeds = outputs.pooler_output
                like = inputs_embeds if ids is None else ids[..., None]
                placeholders = (self.model.get_placeholder_types(ids, like) == number).sum(-1)
                rows = _rows_of_images([len(embed) for embed in embeds], placeholders.tolist())
                expanded = [embeds[index] for row in rows for index in row * expand_size]
                outputs.pooler_output = torch.stack(expanded) if isinstance(embeds, Tensor) else expanded
            return mm_encoder_output

    def _rows_of_images(lengths: list[int], placeholders: list[int]) -> list[list[int]]:
        """Which images belong to each row, given the number of tokens of every image and of placeholders of every row."""
        rows, index = [], 0
        for num_tokens in placeholders:
            start = index
            while num_tokens > 0 and index < len(lengths):
                num_tokens, index = num_tokens - lengths[index], index + 1
            rows.append([*range(start, index)])
        return rows
