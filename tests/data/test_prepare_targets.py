"""`hydra prepare unimrg`: the files of targets, complete or not there, however often and by however many it is started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_painters
from PIL import Image

from hydra_hf.cli import main
from hydra_hf.data.prepare_targets import prepare_targets
from hydra_hf.data.readers import TaskReader
from hydra_hf.data.sources import parse_source
from hydra_hf.training.processes import partial_state


pytestmark = pytest.mark.usefixtures("cache")

SIZES = ((64, 48), (40, 60), (56, 56))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with `depth` and `segment`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_painters.save_depth_model(folder / "depth")
    tiny_painters.save_segment_model(folder / "segment")
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", 6)


def write_images(folder: Path, count: int) -> Path:
    """Pictures in two folders that have the same names."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % 3]
        path = folder / "ab"[number % 2] / f"{number // 2}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return folder


def command(models: Path, images: Path, out: Path, *more: str) -> list[str]:
    words = ["prepare", "unimrg", "--images", images, "--out", out, "--depth_model", models / "depth",
             "--segment_model", models / "segment", "--size", "64", "--patch_size", "8", "--points_per_side", "2",
             "--device", "cpu", *more]  # fmt: skip
    return [str(word) for word in words]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


class Gradient:
    """A painter without a model: from black to white; it stops the run after some pictures."""

    name, settings = "depth", {"model": "none"}

    def __init__(self, last: int = 1000):
        self.left = last

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def __call__(self, image: Image.Image) -> Image.Image:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return Image.linear_gradient("L").resize(image.size).convert("RGB")


def test_targets_of_a_folder_have_the_paths_of_their_images_and_can_be_trained_on(
    models, images, tmp_path, capsys, tiny_processor
):
    out = tmp_path / "targets"
    assert main(command(models, images, out)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/depth: 6 made, 0 kept, 0 failed", f"{out}/segment: 6 made, 0 kept, 0 failed",
    ]  # fmt: skip
    names = [f"{folder}/{number}.png" for folder in "ab" for number in range(3)]
    assert list(contents(out)) == [*(f"depth/{n}" for n in names), *(f"segment/{n}" for n in names), "sheet.png"]
    for name in names:
        image = Image.open(images / name.replace("png", "jpg"))
        assert Image.open(out / "depth" / name).size == image.size
        drawn = Image.open(out / "segment" / name)
        assert drawn.size[0] / drawn.size[1] == pytest.approx(image.size[0] / image.size[1], rel=0.02)
        assert set(np.unique(np.asarray(drawn))) == {0, 255}
    assert Image.open(out / "sheet.png").size == (3 * 256 + 8, 6 * 256 + 14)  # 2 between pictures and around them
    manifest = manifest_of(out)
    assert manifest["depth"]["settings"] == {"model": str(models / "depth")}
    assert manifest["segment"]["settings"]["pred_iou_thresh"] == 0.88
    assert manifest["segment"]["images"] == manifest["segment"]["made"] == 6
    for task in ("depth", "segment"):
        source = parse_source(f"{task}={images},targets={out}/{task}")
        reader = TaskReader((source,), tiny_processor, 0, max_length=200)
        assert reader[0].messages[1]["content"][0]["image"].max() == 1


def test_images_are_found_in_the_json_of_llava(models, images, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
    records = [{"image": path, "conversations": turns} for path in ("a/0.jpg", "b/1.jpg", "a/0.jpg", "../x.jpg")]
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([*records, {"conversations": turns}]))
    out = tmp_path / "targets"
    assert main(command(models, file, out, "--image_root", str(images), "--only", "depth")) == 0
    assert list(contents(out)) == ["depth/a/0.png", "depth/b/1.png", "sheet.png"]
    assert manifest_of(out)["depth"]["skipped"] == {
        "records without the path of one image below the folder of images": 2
    }


def test_what_is_there_is_kept_and_what_is_damaged_is_made_again(models, images, tmp_path):
    out = tmp_path / "targets"
    assert main(command(models, images, out)) == 0
    first = contents(out)
    (out / "depth/a/0.png").unlink()
    (out / "segment/a/0.png").write_bytes(first["segment/a/0.png"][:60])
    Image.new("RGB", (10, 10)).save(out / "depth/b/0.png")
    kept = (out / "depth/a/1.png").stat().st_mtime_ns
    assert main(command(models, images, out)) == 0
    assert contents(out) == first
    assert (out / "depth/a/1.png").stat().st_mtime_ns == kept
    manifest = manifest_of(out)
    assert [(manifest[name]["made"], manifest[name]["kept"]) for name in ("depth", "segment")] == [(2, 4), (1, 5)]


def test_unreadable_images_are_named_and_nothing_is_written_for_them(models, images, tmp_path, capsys):
    (images / "a/0.jpg").write_bytes((images / "a/0.jpg").read_bytes()[:300])
    (images / "b/2.jpg").write_text("no picture")
    Image.new("RGB", (90, 10)).save(images / "b/1.jpg")
    out = tmp_path / "targets"
    assert main(command(models, images, out)) == 0
    assert f"{out}/depth: 3 made, 0 kept, 3 failed, see {out}/manifest.json" in capsys.readouterr().out
    for name in ("depth", "segment"):
        failures = manifest_of(out)[name]["failures"]
        assert list(failures) == ["a/0.jpg", "b/1.jpg", "b/2.jpg"]
        assert "truncated" in failures["a/0.jpg"].lower()
        assert failures["b/1.jpg"] == "90x10 pixels: one side is over 8 times the other"
        assert "cannot identify" in failures["b/2.jpg"]
        files = [str(path.relative_to(out / name)) for path in (out / name).rglob("*") if path.is_file()]
        assert sorted(files) == ["a/1.png", "a/2.png", "b/0.png"]


def test_an_interrupted_run_leaves_whole_files_and_is_completed(images, tmp_path):
    out = tmp_path / "targets"
    with pytest.raises(KeyboardInterrupt):
        prepare_targets(images, out, [Gradient(last=4)], partial_state())
    assert len(contents(out)) == 4
    assert manifest_of(out) == {"depth": {"settings": {"model": "none"}}}  # not finished
    assert "2 made, 4 kept" in str(prepare_targets(images, out, [Gradient()], partial_state()))


def test_training_waits_for_the_end_of_an_interrupted_run(images, tmp_path, tiny_processor):
    (images / "a/0.jpg").write_text("no picture")
    out, source = tmp_path / "targets", parse_source(f"depth={images},targets={tmp_path}/targets/depth")
    with pytest.raises(KeyboardInterrupt):
        prepare_targets(images, out, [Gradient(last=4)], partial_state())
    with pytest.raises(ValueError, match="2 images have no target"):
        TaskReader((source,), tiny_processor, 0, max_length=200)
    prepare_targets(images, out, [Gradient()], partial_state())
    reader = TaskReader((source,), tiny_processor, 0, max_length=200)
    assert all(reader[number] is not None for number in range(6))


def test_failures_of_other_images_in_the_same_folder_stay_known(images, tmp_path):
    (images / "a/0.jpg").write_text("no picture")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"image": f"{name}/{n}.jpg"}) for n in range(3)))
        prepare_targets(tmp_path / f"{name}.jsonl", tmp_path / "out", [Gradient()], partial_state(), image_root=images)
    assert list(manifest_of(tmp_path / "out")["depth"]["failures"]) == ["a/0.jpg"]


def test_targets_of_other_settings_are_not_mixed(models, images, tmp_path, capsys):
    out = tmp_path / "targets"
    assert main(command(models, images, out, "--only", "segment")) == 0
    assert main(command(models, images, out, "--size", "32")) == 2
    assert f"{out}/segment was made with" in capsys.readouterr().err
    assert main(command(models, images, out)) == 0  # depth is new there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--images": "nowhere"}, "--images nowhere does not exist"),
        ({"--out": "IMAGES/targets"}, "is inside the images' folder"),
        ({"--size": "4"}, "size='4' must be like 448 or 448x448"),
        ({"--points_per_side": "0"}, "--points_per_side 0 must be at least 1"),
        ({"--depth_model": "nobody/nothing"}, "The model nobody/nothing cannot be loaded"),
        ({"--segment_model": "DEPTH"}, "is of type 'depth_anything', expected one of"),
        ({"--depth_model": "SEGMENT"}, "is of type 'sam', expected 'depth_anything' or 'dpt'"),
        ({"--segment_model": "a/b/c"}, "a Hub id is owner/name"),
    ],
)
def test_wrong_arguments_are_one_line(models, images, tmp_path, capsys, change, message):
    words = command(models, images, tmp_path / "targets")
    for name, value in change.items():
        value = (
            value.replace("IMAGES", str(images))
            .replace("SEGMENT", str(models / "segment"))
            .replace("DEPTH", str(models / "depth"))
        )
        words[words.index(name) + 1] = value
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "targets").exists()


def test_images_that_would_share_a_target_are_refused(images, tmp_path):
    (images / "a/0.png").write_bytes((images / "a/0.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"a/0.jpg and a/0.png would have one target, a/0.png"):
        prepare_targets(images, tmp_path / "out", [Gradient()], partial_state())


@pytest.mark.parametrize("content", ["[]", "not JSON", '[{"image": "/elsewhere/a.jpg"}]'])
def test_records_without_images_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="has no images"):
        prepare_targets(tmp_path / "a.json", tmp_path / "out", [Gradient()], partial_state())


def test_a_folder_of_nothing_readable_is_an_error(images, tmp_path):
    for path in images.rglob("*.jpg"):
        path.write_text("no picture")
    with pytest.raises(ValueError, match="No depth of 6 images could be made; a/0.jpg: "):
        prepare_targets(images, tmp_path / "out", [Gradient()], partial_state())


# Several processes, and a kill


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_run_is_completed_by_the_same_command(models, tmp_path):
    images, out = write_images(tmp_path / "images", 100), tmp_path / "targets"
    arguments = [sys.executable, "-m", "hydra_hf.cli", *command(models, images, out)]
    with subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while len(list(out.rglob("segment/*/*.png"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    written = {name: content for name, content in contents(out).items() if ".tmp." not in name}
    assert 10 <= len(written) < 200
    for name in written:
        Image.open(out / name).load()
    assert main(command(models, images, out)) == 0
    after = contents(out)
    assert len(after) == 201  # and the sheet; no temporary file is left
    assert {name: after[name] for name in written} == written
    manifest = manifest_of(out)
    assert sum(manifest[name]["kept"] for name in ("depth", "segment")) == len(written)


@pytest.mark.slow
def test_two_processes_share_the_images_and_make_what_one_makes(models, images, tmp_path):
    (images / "a/0.jpg").write_text("no picture")
    assert main(command(models, images, tmp_path / "one")) == 0
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "hydra_hf.cli",
    ]
    done = subprocess.run(
        [*words, *command(models, images, tmp_path / "two")],
        env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 made, 0 kept, 1 failed") == 2  # depth and segment, said once
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert list(one) == list(two)
    for name in one:
        difference = np.abs(np.asarray(Image.open(tmp_path / "one" / name), int) - Image.open(tmp_path / "two" / name))
        assert difference.max() <= 1, name
    assert manifest_of(tmp_path / "two")["depth"]["failures"].keys() == {"a/0.jpg"}
