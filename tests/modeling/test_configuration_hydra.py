"""A config that no model can be made of is one error that names the field."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import hydra_config

from hydra_hf import HydraConfig


BAD_FIELDS = {
    "text_config.rope_parameters.rope_type": ("twisted", "rope_type='twisted' must be one of .*'default'"),
    "text_config.rope_parameters": (
        {"rope_type": "yarn", "rope_theta": 1e6},
        "text_config: Missing required keys in `rope_parameters` .*'yarn': {'factor'}",
    ),
    "text_config.rope_parameters.factor": (
        "2",
        "text_config: rope_parameters has factor='2', expected a number of at least 1",
    ),
    "text_config.num_attention_heads": (0, "text_config: num_attention_heads=0 must be at least 1"),
    "text_config.num_key_value_heads": (3, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    "text_config.hidden_act": ("sharp", "text_config: hidden_act='sharp' must be one of"),
    "text_config.dtype": ("float31", "text_config: dtype='float31' must be a type of torch"),
    "dtype": ("float31", "HydraConfig: dtype='float31' must be a type of torch"),
    "vision_config.num_attention_heads": (0, "vision_config: num_attention_heads=0 must be at least 1"),
    "vision_config.num_gen_layers": (-1, "vision_config: num_gen_layers=-1 must be at least 0"),
    "vision_config.latent_channels": (0, "latent_channels=0 must be at least 1"),
    "vision_config.image_std": ([0.0, 1.0, 1.0], "image_std=.* must be positive"),
    "vision_config.decoder_config.num_attention_heads": (0, "decoder_config: num_attention_heads=0"),
    "vision_head_config.num_attention_heads": (0, "vision_head_config: num_attention_heads=0"),
    "sigma_shift": (-1, "sigma_shift=-1 must be a positive number"),
    "sigma_logit_std": (0.0, "sigma_logit_std=0.0 must be a positive number"),
}


def open_with(folder: Path, name: str, value: object) -> HydraConfig:
    """The tiny config with another value in one field, read from its file."""
    hydra_config().save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    *parts, field = name.split(".")
    part = values
    for key in parts:
        part = part[key]
    part[field] = value
    path.write_text(json.dumps(values))
    return HydraConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_field_that_no_model_can_have_is_named(tmp_path, name):
    value, message = BAD_FIELDS[name]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        open_with(tmp_path, name, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_shift_that_is_not_finite_is_named(tmp_path, value):
    with pytest.raises(StrictDataclassError, match="sigma_shift=.* must be a positive number"):
        open_with(tmp_path, "sigma_shift", value)


def test_the_config_itself_opens(tmp_path):
    assert open_with(tmp_path, "sigma_shift", 2).sigma_shift == 2
