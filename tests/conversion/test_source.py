import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_sources import internvl_vision, siglip2_vision

from hydra_hf import HydraTokModel
from hydra_hf.conversion.convert import convert
from hydra_hf.conversion.source import Source


@pytest.fixture
def vit(tmp_path):
    """The folder of a small InternViT."""
    internvl_vision(tmp_path / "vit")
    return tmp_path / "vit"


def change(folder, **changes):
    """Writes tensors of the folder anew; None takes one away."""
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    tensors |= changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def shard(folder, number: int = 3):
    """The single file of a folder as `number` files with an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-{index % number}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def error_of(folder) -> str:
    with pytest.raises(ValueError) as error:
        convert(str(folder), folder.parent / "out")
    assert not (folder.parent / "out").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return str(error.value)


# Every name is accounted for


def test_a_name_that_no_rule_knows_is_an_error(vit):
    change(vit, **{"encoder.layer.0.attention.q_norm.weight": torch.ones(32), "logit_scale": torch.ones(1)})
    assert "2 unexpected: encoder.layer.0.attention.q_norm.weight, logit_scale." in error_of(vit)


def test_a_layer_more_than_the_config_has_is_an_error(vit):
    change(vit, **{"encoder.layer.5.lambda_1": torch.ones(32)})
    assert "1 unexpected: encoder.layer.5.lambda_1." in error_of(vit)


def test_a_weight_that_is_not_there_is_an_error(vit):
    change(vit, **{"encoder.layer.3.mlp.fc1.bias": None, "embeddings.cls_token": None})
    assert "2 missing: gen_vit.embeddings.cls_token, sem_vit.layers.1.mlp.fc1.bias." in error_of(vit)


def test_a_weight_of_another_shape_is_an_error_that_names_both(vit):
    change(vit, **{"encoder.layer.0.lambda_1": torch.ones(31)})
    message = error_of(vit)
    assert "1 of another shape: encoder.layer.0.lambda_1 gives (31,) for (32,) of gen_vit.layers.0.scale_1" in message
    assert "missing" not in message


def test_a_weight_that_is_there_twice_is_an_error(vit):
    change(vit, **{"vision_tower.encoder.layer.0.lambda_1": torch.ones(32)})
    assert "1 repeated" in error_of(vit)


def test_all_that_is_wrong_is_told_at_once_and_long_lists_are_cut(vit):
    names = {f"strange.{index:02}": torch.ones(1) for index in range(20)}
    change(vit, **names, **{"embeddings.cls_token": None, "encoder.layer.0.lambda_1": torch.ones(31)})
    message = error_of(vit)
    assert "20 unexpected" in message
    assert "strange.07, and 12 more" in message
    assert "1 missing" in message
    assert "1 of another shape" in message


def test_names_beside_the_vit_are_ignored_only_in_the_family_that_has_them(vit, tmp_path):
    change(vit, **{"lm_head.weight": torch.ones(1), "embeddings.mask_token": torch.ones(1)})
    convert(str(vit), tmp_path / "out")
    siglip2_vision(tmp_path / "inner" / "siglip")
    change(tmp_path / "inner" / "siglip", **{"lm_head.weight": torch.ones(1)})
    assert "1 unexpected: lm_head.weight" in error_of(tmp_path / "inner" / "siglip")


# What is read


def test_a_sharded_source_gives_the_same_as_a_single_file(vit, tmp_path):
    whole = HydraTokModel.from_pretrained(convert(str(vit), tmp_path / "whole")).state_dict()
    shard(vit)
    sharded = HydraTokModel.from_pretrained(convert(str(vit), tmp_path / "sharded")).state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_a_shard_that_is_not_there_is_an_error(vit):
    shard(vit)
    (vit / "model-1.safetensors").unlink()
    assert "lacks the files ['model-1.safetensors']" in error_of(vit)


def test_pickled_weights_are_refused(vit):
    (vit / "model.safetensors").unlink()
    torch.save({}, vit / "pytorch_model.bin")
    assert "only pickled weights (*.bin), which are never opened" in error_of(vit)


def test_a_folder_without_weights_is_an_error(vit):
    (vit / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in error_of(vit)


def test_a_broken_file_is_an_error(vit):
    data = (vit / "model.safetensors").read_bytes()
    (vit / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot be read as safetensors" in error_of(vit)


def test_quantised_weights_are_an_error(vit):
    change(vit, **{"encoder.layer.0.lambda_1": torch.ones(32, dtype=torch.int8)})
    assert "encoder.layer.0.lambda_1" in (message := error_of(vit))
    assert "of type I8" in message


def test_a_folder_without_config_is_an_error(vit):
    (vit / "config.json").unlink()
    assert "has no config.json" in error_of(vit)


def test_a_config_that_is_no_json_is_an_error(vit):
    (vit / "config.json").write_text("{")
    assert "config.json is not JSON" in error_of(vit)


def test_a_config_whose_numbers_do_not_fit_each_other_is_an_error(vit):
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    assert "does not fit HYDRA" in (message := error_of(vit))
    assert "hidden_size=32 must be a multiple of 1 x 5 heads" in message


def test_what_is_neither_a_folder_nor_a_repo_id_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There is no folder .*; a Hub id is owner/name"):
        Source(str(tmp_path / "nowhere" / "at" / "all"))


def test_a_revision_of_a_folder_is_an_error(vit):
    with pytest.raises(ValueError, match="revisions are for the Hub"):
        Source(str(vit), "main")


def test_a_repository_that_cannot_be_had_is_one_of_the_errors_that_the_command_line_shows():
    with pytest.raises((ValueError, OSError)):
        Source("nobody/nothing")  # tests are offline
