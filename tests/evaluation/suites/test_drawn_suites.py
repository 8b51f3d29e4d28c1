"""DPG-Bench, WISE, T2I-CompBench, ImgEdit, GEdit and VBench: files in the layouts that their scorers read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_tasks import png_bytes

from hydra_hf.evaluation.suites import SUITES, edits, load_suite, text_to_image, vbench


def files(folder: Path, ending: str = ".png") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{ending}"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# Text to image


@pytest.fixture
def dpg_bench(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name, text in {"b12": "a cat and a dog\n", "a3": "a red circle"}.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    return tmp_path / "prompts"


@pytest.fixture
def wise(tmp_path):
    (tmp_path / "wise").mkdir()
    rows = [
        {"prompt_id": 2, "Prompt": "a cat", "Category": "Food"},
        {"prompt_id": 1, "Prompt": "a dog", "Category": "Food"},
    ]
    (tmp_path / "wise" / "culture.json").write_text(json.dumps(rows))
    (tmp_path / "wise" / "space.json").write_text(
        json.dumps([{"prompt_id": 601, "Prompt": "a star", "Category": "Space"}])
    )
    return tmp_path / "wise"


@pytest.fixture
def t2i_compbench(tmp_path):
    (tmp_path / "compbench").mkdir()
    (tmp_path / "compbench" / "color_val.txt").write_text("a red cat/dog\na blue dog\n")
    (tmp_path / "compbench" / "shape_val.txt").write_text("a star\n")
    (tmp_path / "compbench" / "color_train.txt").write_text("not this one\n")
    return tmp_path / "compbench"


def draw(pipeline, suite, data, folder, **options):
    return load_suite(suite)(pipeline, "tiny", data=data, folder=folder, **{"num_inference_steps": 1} | options)


def test_dpg_bench_has_a_grid_of_four_for_each_prompt(tiny_pipeline, dpg_bench, tmp_path):
    out = tmp_path / "out"
    result = draw(tiny_pipeline, "dpg_bench", dpg_bench, out)
    assert files(out / "images") == ["a3.png", "b12.png"]
    grid, parts = (
        pixels(out / "images" / "a3.png"),
        [pixels(out / "samples" / f"a3_{index}.png") for index in range(4)],
    )
    assert (grid == np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)], 0)).all()
    assert len({part.tobytes() for part in parts}) == 4
    assert result.scores == {}
    assert result.counts == {"prompts": 2, "images": 8}
    assert "not the 1065" in result.notes[-1]


def test_wise_has_an_image_for_each_prompt_id(tiny_pipeline, wise, tmp_path):
    draw(tiny_pipeline, "wise", wise, tmp_path / "out")
    assert files(tmp_path / "out" / "images") == ["1.png", "2.png", "601.png"]


def test_t2i_compbench_names_the_images_after_the_prompts(tiny_pipeline, t2i_compbench, tmp_path):
    draw(tiny_pipeline, "t2i_compbench", t2i_compbench, tmp_path / "out", num_images=2)
    names = ["a blue dog_000002", "a blue dog_000003", "a red cat dog_000000", "a red cat dog_000001"]
    assert files(tmp_path / "out" / "color" / "samples") == [f"{name}.png" for name in names]
    assert files(tmp_path / "out" / "shape" / "samples") == ["a star_000000.png", "a star_000001.png"]


def test_evalscope_gets_every_image_with_its_prompt(tiny_pipeline, wise, tmp_path):
    draw(tiny_pipeline, "wise", wise, tmp_path / "out", limit=2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "evalscope.jsonl").read_text().splitlines()]
    assert [(row["prompt"], Path(row["image_path"]).name) for row in rows] == [("a dog", "1.png"), ("a cat", "2.png")]
    assert all(Path(row["image_path"]).is_absolute() and Path(row["image_path"]).is_file() for row in rows)


def test_evalscope_scores_the_images_that_its_file_lists(tiny_pipeline, wise, tmp_path):
    """By PSNR to the first image: a metric of evalscope that needs no weights."""
    evalscope = pytest.importorskip("evalscope")
    draw(tiny_pipeline, "wise", wise, tmp_path / "out")
    path = tmp_path / "out" / "evalscope.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first = {"reference_image_path": rows[0]["image_path"]}
    path.write_text("".join(json.dumps(row | first) + "\n" for row in rows))
    arguments = {"general_t2i": {"local_path": str(path), "metric_list": ["PSNR"]}}
    config = {"model_id": "hydra", "datasets": ["general_t2i"], "dataset_args": arguments}
    report = evalscope.run_task(evalscope.TaskConfig(**config, work_dir=str(tmp_path / "scores")))["general_t2i"]
    images = [pixels(Path(row["image_path"])) / 255 for row in rows]
    food, food_too, space = [100, *(-10 * np.log10(((image - images[0]) ** 2).mean()) for image in images[1:])]
    found = {tuple(metric.identity.dimensions.values()): (metric.num, metric.score) for metric in report.metrics}
    assert found == {
        ("overall",): (3, pytest.approx((food + food_too + space) / 3, abs=1e-3)),
        ("food",): (2, pytest.approx((food + food_too) / 2, abs=1e-3)),
        ("space",): (1, pytest.approx(space, abs=1e-3)),
    }


@pytest.mark.parametrize("suite", text_to_image.BENCHMARKS)
def test_an_empty_folder_is_an_error(tiny_pipeline, suite, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no rows"):
        draw(tiny_pipeline, suite, tmp_path / "empty", tmp_path / "out")


# Edits


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (32, 32), "orange")


def test_imgedit_names_the_results_by_key(clip_pipeline, picture, tmp_path):
    (tmp_path / "images" / "animal").mkdir(parents=True)
    picture.save(tmp_path / "images" / "animal" / "1.jpg")
    rows = {key: {"id": "animal/1.jpg", "prompt": "a red circle", "edit_type": "add"} for key in ("7", "12")}
    (tmp_path / "singleturn.json").write_text(json.dumps(rows))
    options = {"suite": "imgedit", "data": tmp_path / "singleturn.json", "image_root": tmp_path / "images"}
    result = edits.run(clip_pipeline, "tiny", folder=tmp_path / "out", num_inference_steps=1, **options)
    assert files(tmp_path / "out") == ["12.png", "7.png"]
    assert result.counts == {"edits": 2}
    assert pixels(tmp_path / "out" / "7.png").tobytes() != pixels(tmp_path / "out" / "12.png").tobytes()  # other noise
    before = (tmp_path / "out" / "12.png").read_bytes()
    (tmp_path / "out" / "12.png").unlink()
    edits.run(clip_pipeline, "tiny", folder=tmp_path / "out", num_inference_steps=1, **options)
    assert (tmp_path / "out" / "12.png").read_bytes() == before


def test_gedit_sorts_results_by_task_and_language(clip_pipeline, picture, tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"key": "k1", "task_type": "color_alter", "instruction_language": "en", "instruction": "a red circle",
           "input_image": {"bytes": png_bytes(picture), "path": None}}  # fmt: skip
    rows = [row, {**row, "key": "k2", "instruction_language": "cn"}]
    (tmp_path / "data").mkdir()
    names = ("key", "task_type", "instruction_language", "instruction")
    features = datasets.Features(
        {name: datasets.Value("string") for name in names} | {"input_image": datasets.Image()}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    options = {"suite": "gedit", "data": tmp_path / "data", "folder": tmp_path / "out", "num_inference_steps": 1}
    edits.run(clip_pipeline, "tiny", **options)
    expected = [f"fullset/color_alter/{name}{kind}.png" for name in ("cn/k2", "en/k1") for kind in ("", "_SRCIMG")]
    assert files(tmp_path / "out") == expected
    assert (pixels(tmp_path / "out" / expected[1]) == np.asarray(picture)).all()


# Clips


def test_vbench_has_five_clips_of_a_prompt_and_25_for_flickering(tmp_path):
    rows = [{"prompt_en": "a cat", "dimension": ["scene"]}, {"prompt_en": "a dog", "dimension": ["temporal_flickering"]},
            {"prompt_en": "a cat", "dimension": ["color"]}]  # fmt: skip
    (tmp_path / "info.json").write_text(json.dumps(rows))
    prompts = vbench.read_prompts(tmp_path / "info.json")
    assert prompts == [("a cat", ["scene", "color"]), ("a dog", ["temporal_flickering"])]
    assert [vbench.num_clips(dimensions) for _, dimensions in prompts] == [5, 25]


def test_vbench_names_the_clips_after_the_prompts(clip_pipeline, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "a cat.", "dimension": ["scene"]}]))
    size = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1, "num_images": 2}
    result = vbench.run(clip_pipeline, "tiny", data=tmp_path / "info.json", folder=tmp_path / "out", **size)
    assert files(tmp_path / "out", ".mp4") == ["a cat.-0.mp4", "a cat.-1.mp4"]
    assert result.counts == {"prompts": 1, "clips": 2}
    assert result.protocol["num_frames"] == 5


def test_every_suite_can_be_imported_without_its_extra():
    assert all(callable(load_suite(name)) for name in SUITES)
