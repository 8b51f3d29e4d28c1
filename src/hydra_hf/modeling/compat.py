"""What differs between the supported versions of transformers, in one place; the oldest and the newest are in setup.cfg.

Inside this package a cache of keys and values is `cache`, as in transformers 5.24. Up to 5.23 it is `past_key_values`, in the
arguments of forwards and in the fields of outputs. `CACHE` is the installed library's word, for calls to the library.
"""

from dataclasses import dataclass, fields

from torch import Tensor
from transformers import AutoConfig, configuration_utils, modeling_utils
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, under whichever of its two names it came. Raises ValueError for both at once."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Got both cache and past_key_values, expected one: they are two names of one argument.")
    return past_key_values if cache is None else cache


if hasattr(modeling_utils, "slice_logits_to_keep"):  # since 5.21
    slice_logits_to_keep = modeling_utils.slice_logits_to_keep
else:

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Hidden states (B, L, D) of the last `logits_to_keep` positions, 0 is all; or of those that a tensor names."""
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
            specs = cls.sub_configs_defaults.items()
            cls.sub_configs_defaults = {
                name: spec if isinstance(spec, SubConfigSpec) else SubConfigSpec(spec) for name, spec in specs
            }
            cls.sub_configs = {name: spec.config_class for name, spec in cls.sub_configs_defaults.items()}

        def __post_init__(self, **kwargs):
            for name, spec in self.sub_configs_defaults.items():
                setattr(self, name, spec.create(getattr(self, name)))
            super().__post_init__(**kwargs)
