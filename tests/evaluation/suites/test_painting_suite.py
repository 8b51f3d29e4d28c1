"""The suite that scores what is painted of a folder of images."""

import json
import shutil

import pytest
import torch

from hydra_hf import TINY, HydraPipeline
from hydra_hf.cli import main
from hydra_hf.data.painting import MANIFEST
from hydra_hf.evaluation.suites.painting import PAINTED, find_painted, mean_scores, read_maps, run, trivial_maps
from hydra_hf.files import write_file
from hydra_hf.toy.language import PAINTED as PAINTERS
from hydra_hf.toy.world import ToyWorld


FOLDERS = {"reconstruct": "images", "depth": "targets/depth", "segment": "targets/segment"}


@pytest.fixture(scope="module")
def pipeline() -> HydraPipeline:
    return HydraPipeline.from_pretrained(TINY)


@pytest.fixture(scope="module")
def scenes(pipeline, tmp_path_factory):
    """Held-out pictures and their maps, in folders as `hydra prepare unimrg` makes them."""
    folder, world = tmp_path_factory.mktemp("scenes"), ToyWorld(difficulty=1)
    for index in range(2):
        drawn = world.sample_scenes(2, torch.Generator().manual_seed(index), split="test")
        for task, painter in PAINTERS.items():
            pictures = pipeline.processor.image_processor.postprocess(
                getattr(world, painter)(drawn), output_type="pil"
            )
            for number, picture in enumerate(pictures):
                path = folder / FOLDERS[task] / f"{index}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, picture.save)
    return folder


def test_painted_maps_fit_and_trivial_ones_do_not(pipeline, scenes):
    result = run(pipeline, "tiny", data=scenes / "images", targets=scenes / "targets", batch_size=2)
    scores = result.scores
    assert result.counts == {"images": 4, "without_target": 0}
    assert scores["painting/foreground_iou"] > 0.8 > scores["painting_another/foreground_iou"]
    assert scores["painting/boundary_f"] > 0.8 > scores["painting_mean/boundary_f"]
    assert scores["painting_black/white_share"] == 0
    assert scores["painting/psnr"] > scores["painting_black/psnr"]


def test_the_truth_has_the_best_scores(pipeline, scenes):
    paths, _ = find_painted(scenes / "images", scenes / "targets", None)
    truth = [
        read_maps(scenes / "images", scenes / "targets", path, pipeline.processor.image_processor) for path in paths
    ]
    best = mean_scores(truth, truth)
    assert (best["depth_similarity"], best["foreground_iou"], best["boundary_f"]) == (1, 1, 1)


def test_trivial_maps_are_resized_to_each_image():
    sizes = ((32, 32), (32, 48), (64, 32))
    truth = [{task: torch.full((1, 3, *size), index / 2) for task in PAINTED} for index, size in enumerate(sizes)]
    trivial = trivial_maps(truth)
    for maps in trivial.values():
        assert [tuple(row["depth"].shape[-2:]) for row in maps] == [*sizes]
    assert [row["depth"].mean().item() for row in trivial["another"]] == pytest.approx([1, 0, 0.5])
    assert [row["depth"].mean().item() for row in trivial["mean"]] == pytest.approx([0.5] * 3)
    assert [row["depth"].mean().item() for row in trivial["black"]] == [-1] * 3


def test_a_missing_target_is_named_and_a_known_failure_is_left_out(scenes, tmp_path):
    targets = tmp_path / "targets"
    shutil.copytree(scenes / "targets", targets)
    (targets / "segment" / "1" / "0.png").unlink()
    with pytest.raises(ValueError, match="1 of 4 images have no target in .*segment, such as 1/0.png"):
        find_painted(scenes / "images", targets, None)
    (targets / MANIFEST).write_text(json.dumps({"segment": {"failures": {"1/0.png": "no mask"}}}))
    paths, num_failed = find_painted(scenes / "images", targets, None)
    assert (paths, num_failed) == (["0/0.png", "0/1.png", "1/1.png"], 1)
    shutil.rmtree(targets / "depth")
    with pytest.raises(ValueError, match="depth is not a folder, expected the targets"):
        find_painted(scenes / "images", targets, None)


def test_the_command_needs_targets(scenes, tmp_path, capsys):
    arguments = [
        "evaluate",
        "--suite",
        "painting",
        "--data",
        str(scenes / "images"),
        "--out",
        str(tmp_path / "a.json"),
    ]
    assert main(arguments) != 0
    assert "--suite painting needs --targets" in capsys.readouterr().err
