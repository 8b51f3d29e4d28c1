"""Weights that do not fit their config are an error, never random."""

import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import flow_decoder_config, hydra_model, tok_config, tok_model

from hydra_hf import HydraForConditionalGeneration, HydraModel, HydraTokModel


@pytest.fixture(params=[HydraTokModel, HydraForConditionalGeneration, HydraModel])
def folder(request, tmp_path) -> tuple[type, Path]:
    """A class, and a checkpoint that it opens."""
    model = tok_model() if request.param is HydraTokModel else hydra_model()
    model.save_pretrained(tmp_path)
    return request.param, tmp_path


def key_of(cls: type) -> str:
    key = "sem_vit.layers.1.mlp.fc1.weight"
    return key if cls is HydraTokModel else f"model.vision_tower.{key}"


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.get("vision_config", config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_checkpoint_opens_as_it_was_saved(folder):
    cls, path = folder
    assert all(torch.isfinite(weight).all() for weight in cls.from_pretrained(path).state_dict().values())


def test_a_missing_weight_is_an_error_that_names_it(folder):
    cls, path = folder
    edit_weights(path, lambda weights: weights.pop(key_of(cls)))
    with pytest.raises(ValueError, match=r"1 \(.*sem_vit\.layers\.1\.mlp\.fc1\.weight\) missing, none not expected"):
        cls.from_pretrained(path)


DEPTHS = {
    3: r"\d+ \(.*sem_vit\.layers\.2\..*\) missing",
    1: r"none missing, \d+ \(.*sem_vit\.layers\.1\..*\) not expected",
}


@pytest.mark.parametrize("num_layers, fault", DEPTHS.items())
def test_a_config_of_another_depth_is_an_error(folder, num_layers, fault):
    cls, path = folder
    edit_config(path, num_sem_layers=num_layers)
    with pytest.raises(ValueError, match=fault):
        cls.from_pretrained(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(folder, value):
    cls, path = folder
    edit_weights(path, lambda weights: weights[key_of(cls)].view(-1)[3:4].fill_(value))
    with pytest.raises(
        ValueError, match=r"damaged: .*sem_vit\.layers\.1\.mlp\.fc1\.weight has values that are not finite"
    ):
        cls.from_pretrained(path)


def test_loading_info_says_that_missing_weights_are_wanted(folder):
    cls, path = folder
    edit_weights(path, lambda weights: weights.pop(key_of(cls)))
    _, info = cls.from_pretrained(path, output_loading_info=True)
    assert len(info["missing_keys"]) == 1


def test_without_a_folder_all_weights_are_new(folder):
    cls, path = folder
    config = cls.config_class.from_pretrained(path)
    assert isinstance(cls.from_pretrained(None, config=config, state_dict={}), cls)


def test_a_model_without_heads_does_not_open_as_one_with_heads(tmp_path):
    hydra_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(lm_head\.weight, vision_head|\(vision_head\..*\) missing"):
        HydraForConditionalGeneration.from_pretrained(tmp_path)


def test_an_encoder_may_leave_the_decoder_behind(tmp_path):
    tok_model(decoder_config=flow_decoder_config(hidden_size=24)).save_pretrained(tmp_path)
    assert HydraTokModel.from_pretrained(tmp_path, config=tok_config(decoder_config=None)).pixel_decoder is None


def test_weights_of_a_time_token_that_the_config_does_not_have_are_an_error(tmp_path):
    hydra_model().save_pretrained(tmp_path)
    config = HydraModel.config_class.from_pretrained(tmp_path)
    config.use_time_token = False
    with pytest.raises(ValueError, match="time_embedding"):
        HydraForConditionalGeneration.from_pretrained(tmp_path, config=config)


def test_a_tied_language_head_is_not_missing(tmp_path):
    model = hydra_model()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = HydraForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("make", [tok_model, hydra_model])
def test_all_parts_follow_a_change_of_attention_and_none_is_warned_of(make, caplog):
    model = make()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model.set_attn_implementation("eager")
    finally:
        logger.removeHandler(caplog.handler)
    chosen = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert chosen == {"eager"}
    assert not caplog.records


def test_the_patch_projection_can_be_replaced():
    model = tok_model()
    projection = torch.nn.Conv2d(3, 24, 4, stride=4)
    model.set_input_embeddings(projection)
    assert model.get_input_embeddings() is projection


def test_diffusers_sees_the_arguments_of_save_pretrained():
    """It passes on `variant` and `max_shard_size` only to those whose signature has them."""
    assert {"variant", "max_shard_size"} <= set(inspect.signature(HydraModel.save_pretrained).parameters)
