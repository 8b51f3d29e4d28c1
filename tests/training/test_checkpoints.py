import json

import pytest
import torch
from safetensors import SafetensorError

from hydra_hf.files import write_folder, write_text
from hydra_hf.training.checkpoints import (
    find_checkpoints,
    finish_checkpoint,
    forget_later_rows,
    last_whole_checkpoint,
    load_state,
    remove_old_checkpoints,
    save_state,
)


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


# Checkpoints of a stage


def make_checkpoint(folder, step: int):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_state(checkpoint, "model", {"weight": torch.arange(1000.0)})
    save_state(checkpoint, "step", {"value": step})
    finish_checkpoint(checkpoint)
    return checkpoint


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def overwrite(path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES = {
    "weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "weights of zeros": lambda folder: overwrite(folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "JSON cut short": lambda folder: cut(folder / "model.json"),
    "JSON of zeros": lambda folder: overwrite(folder / "model.json"),
    "no state": lambda folder: (folder / "step.json").unlink(),
    "a manifest cut short": lambda folder: cut(folder / "files.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_older_whole_one(tmp_path, caplog, damage):
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    assert last_whole_checkpoint(tmp_path) == str(newest)
    DAMAGES[damage](newest)
    with caplog.at_level("WARNING"):
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert f"{newest} is skipped: " in caplog.text


def test_without_a_whole_checkpoint_a_stage_starts_anew(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-4").mkdir()
    assert last_whole_checkpoint(tmp_path) is None


def test_only_folders_of_a_step_are_checkpoints(tmp_path):
    for step in (2, 10):
        make_checkpoint(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-12.tmp", "checkpoint-13-copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-14").write_text("a file")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-2"]
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-10")


def test_the_newest_two_checkpoints_are_kept_with_their_shards(tmp_path):
    for step in (2, 4, 6, 9):
        make_checkpoint(tmp_path, step)
        (tmp_path / f"shards-{step}").mkdir()
    remove_old_checkpoints(tmp_path, tmp_path / "checkpoint-6")  # resumed from 4, since 9 was damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6", "shards-4", "shards-6"]


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    forget_later_rows(log, 3)
    assert not log.exists()
    log.write_text('{"step": 2}\n{"step": 3}\n{"step": 4}\n{"ste')
    forget_later_rows(log, 3)
    assert log.read_text() == '{"step": 2}\n{"step": 3}\n'


def test_no_tensor_is_copied_where_it_is_saved_from(tmp_path, monkeypatch):
    """A copy of the optimizer on the device would cost its memory again."""

    def fail(*_, **__) -> None:
        raise AssertionError("a clone")

    monkeypatch.setattr(torch.Tensor, "clone", fail)
    save_state(tmp_path, "optimizer", {"first": torch.ones(3), "second": torch.ones(3)})
    monkeypatch.undo()
    assert torch.equal(load_state(tmp_path, "optimizer")["second"], torch.ones(3))


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "final"

    def fail(path) -> None:
        (path / "half.json").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="final cannot be written: .*No space left on device"):
        write_folder(folder, fail)
    assert list(tmp_path.iterdir()) == []
