import json

import pytest
import torch

from hydra_hf.files import write_folder, write_text
from hydra_hf.training.checkpoints import load_state, save_state


def test_a_state_comes_back_as_it_was_but_for_tuples(tmp_path):
    state = {
        "step": 3,
        "rate": 1e-3,
        "betas": (0.9, 0.95),
        "groups": [{"params": [0, 1], "lr": 0.1}],
        "state": {0: {"exp_avg": torch.arange(6.0).reshape(2, 3)}, 1: {"step": torch.tensor(4.0)}},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "empty": {},
    }
    save_state(tmp_path, "optimizer", state)
    loaded = load_state(tmp_path, "optimizer")
    torch.testing.assert_close(loaded, {**state, "betas": [0.9, 0.95]}, rtol=0, atol=0)
    assert list(loaded["state"]) == [0, 1]  # numbers, which JSON's own keys are not


def test_flags_names_and_none_come_back(tmp_path):
    state = {"name": "adamw", "flags": [True, False, None], "rate": 1}
    save_state(tmp_path, "group", state)
    loaded = load_state(tmp_path, "group")
    assert loaded == state
    assert loaded["flags"][0] is True


def test_tied_and_transposed_tensors_come_back(tmp_path):
    weight = torch.randn(2, 3)
    save_state(tmp_path, "model", {"embedding": weight, "head": weight, "transposed": weight.T})
    loaded = load_state(tmp_path, "model")
    assert torch.equal(loaded["embedding"], weight)
    assert torch.equal(loaded["head"], weight)
    assert torch.equal(loaded["transposed"], weight.T)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"model\.a\.b"):
        save_state(tmp_path, "model", {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}})


def test_a_state_without_tensors_comes_back(tmp_path):
    save_state(tmp_path, "step", {"value": 7})
    assert load_state(tmp_path, "step") == {"value": 7}


def test_a_state_is_safetensors_and_json_and_nothing_else(tmp_path):
    save_state(tmp_path, "model", {"weight": torch.ones(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_what_is_neither_tensor_nor_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(tmp_path, "model", {"device": torch.device("cpu")})


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "checkpoint"
    write_folder(folder, lambda path: (path / "old.json").write_text("1"))
    write_folder(folder, lambda path: (path / "new.json").write_text("2"))
    assert [path.name for path in folder.iterdir()] == ["new.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_writer_that_fails_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "checkpoint"
    write_folder(folder, lambda path: (path / "old.json").write_text("1"))

    def fail(path):
        (path / "old.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, fail)
    assert (folder / "old.json").read_text() == "1"


def test_what_a_killed_writer_left_is_not_in_the_next_folder(tmp_path):
    (tmp_path / "checkpoint.tmp").mkdir()
    (tmp_path / "checkpoint.tmp" / "half.json").write_text("{")
    write_folder(tmp_path / "checkpoint", lambda path: (path / "whole.json").write_text("{}"))
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["whole.json"]


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "scores.json"
    write_text(path, "first")
    write_text(path, json.dumps({"psnr": 1}))
    assert json.loads(path.read_text()) == {"psnr": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
