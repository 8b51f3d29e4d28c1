"""The real lmms-eval asks, and lets draw, the embedded checkpoint on local tasks. Needs the extra `lmms_eval`."""

import json
from importlib.metadata import entry_points

import pytest
from PIL import Image
from toy_tasks import embedded_pipeline, png_bytes, toy_questions

from hydra_hf import TINY
from hydra_hf.evaluation.report import SuiteResult
from hydra_hf.pipelines.answering import answer


pytest.importorskip("lmms_eval")
datasets = pytest.importorskip("datasets")

from hydra_hf.evaluation.suites.lmms_eval import named_scores, run  # noqa: E402
from hydra_hf.evaluation.suites.lmms_eval_model import HydraChat, HydraSimple  # noqa: E402


YAML = """
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.{text}
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, do_sample: false}}
process_results: !function utils.{score}
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
import json
from pathlib import Path


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_none(doc):
    return []


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def doc_to_drawing(doc, lmms_eval_specific_kwargs=None):
    return f"[GEN_PROMPT]a red circle[/GEN_PROMPT][QUESTION]{doc['question']}[/QUESTION]"


def score(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}


def score_image(doc, results):
    return {"exact": float(all(Path(path).is_file() for path in json.loads(results[0])["images"]))}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks: questions, drawing before the answer, and editing."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{**row, "image": {"bytes": png_bytes(row["image"])}} for row in toy_questions()]
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "toy.parquet")
    (folder / "utils.py").write_text(UTILS)
    for task, kind, text, score in (
        ("toy_vqa", "generate_until", "doc_to_text", "score"),
        ("toy_vqa_visual_cot", "generate_visual_cot", "doc_to_drawing", "score"),
        ("toy_draw", "generate_until", "doc_to_text", "score_image"),
    ):
        text = YAML.format(task=task, file=folder / "toy.parquet", kind=kind, text=text, score=score)
        (folder / f"{task}.yaml").write_text(text)
    return folder


def measure(tasks, folder, name, **options) -> SuiteResult:
    return run(embedded_pipeline(), TINY, tasks=name, include_path=tasks, folder=folder, **options)


def test_the_harness_counts_what_the_model_answers(tasks, tmp_path):
    rows, pipeline = toy_questions(), embedded_pipeline()
    given = answer(
        pipeline.model, pipeline.processor, [row["image"] for row in rows], [row["question"] for row in rows]
    )
    right = sum(text == row["answer"] for text, row in zip(given, rows)) / len(rows)
    result = measure(tasks, tmp_path, "toy_vqa", batch_size=8)
    assert result.scores == {"toy_vqa/exact": right}
    assert right > 0.7
    assert result.counts == {"rows of toy_vqa": len(rows)}
    assert result.versions["lmms_eval"]
    (log,) = tmp_path.rglob("answers.jsonl")
    assert [json.loads(line)["answer"] for line in log.read_text().splitlines() if line] == given


def test_answers_that_are_there_are_not_asked_for_again(tasks, tmp_path, monkeypatch):
    measure(tasks, tmp_path, "toy_vqa", limit=4)
    (log,) = tmp_path.rglob("answers.jsonl")
    log.write_text(log.read_text().rpartition("\n")[0] + '\n{"key": "cut of')  # the last answer, half written
    asked, of_model = [], HydraChat.answer

    def count(self, conversations, options):
        asked.extend(conversations)
        return of_model(self, conversations, options)

    monkeypatch.setattr(HydraChat, "answer", count)
    result = measure(tasks, tmp_path, "toy_vqa", limit=5)
    assert len(asked) == 2
    assert result.counts == {"rows of toy_vqa": 5}
    assert "first 5 rows" in result.notes[0]
    assert not result.is_comparable


def test_it_draws_before_it_answers(tasks, tmp_path, monkeypatch):
    seen, of_model = [], HydraSimple.answer

    def look(self, conversations, options):
        seen.extend(conversations)
        return of_model(self, conversations, options)

    monkeypatch.setattr(HydraSimple, "answer", look)
    result = measure(tasks, tmp_path, "toy_vqa_visual_cot", limit=2, num_inference_steps=2)
    assert set(result.scores) == {"toy_vqa_visual_cot/exact"}
    drawn = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in drawn] == ["0.png", "1.png"]
    parts = seen[0][0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    assert parts[1]["image"].tobytes() == Image.open(drawn[0]).tobytes()
    assert parts[2]["text"] == toy_questions()[0]["question"]  # without the tags


def test_tasks_whose_answer_is_an_image_get_files(tasks, tmp_path):
    result = measure(tasks, tmp_path, "toy_draw", limit=2, mode="generation", num_inference_steps=1)
    assert result.scores == {"toy_draw/exact": 1.0}
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_unknown_tasks_are_an_error(tasks, tmp_path):
    with pytest.raises(ValueError, match="no tasks toy_other"):
        measure(tasks, tmp_path, "toy_vqa,toy_other")


def test_lmms_eval_finds_hydra_by_its_name():
    found = [point for point in entry_points(group="lmms_eval.models") if point.name == "hydra"]
    if not found:
        pytest.skip("the package is not installed, only on the path")
    from lmms_eval.models import get_model

    assert get_model("hydra") is HydraChat
    assert get_model("hydra", force_simple=True) is HydraSimple


def test_metrics_become_scores_of_one_unit():
    measured = {
        "mme": {"mme_perception_score": 1200.0, "mme_cognition_score": 300.0},
        "mmbench_en_dev": {"gpt_eval_score": 80.0},
    }
    measured |= {f"mvbench_{index}": {"mvbench_accuracy": 50.0} for index in range(20)}
    assert named_scores(measured) == {"mme": 1500.0, "mmbench_en_dev": 0.8, "mvbench": 0.5}
    del measured["mvbench_3"]
    assert "mvbench" not in named_scores(measured)  # a part of it is another number
