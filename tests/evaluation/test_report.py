"""Results of suites, and the tables of the papers that they are put into."""

import json
from dataclasses import replace
from operator import mul

import pytest

from hydra_hf.evaluation.papers import TABLES, report
from hydra_hf.evaluation.report import TOY_WORLD, SuiteResult


RESULT = SuiteResult(
    "geneval", "my/model", {"geneval/two_object": 0.5, "geneval/overall": 0.25}, {"num_inference_steps": 50}, {"seed": 3},
    {"prompts": 553}, True, ["A note."],
)  # fmt: skip


def table(source: str):
    (found,) = [table for table in TABLES if table.source.startswith(source)]
    return found


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    RESULT.save(tmp_path / "result.json")
    assert SuiteResult.load(tmp_path / "result.json") == RESULT
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["markdown"].splitlines()[-1] == "| my/model | 0.5 | 0.25 |"
    assert {"torch", "transformers", "diffusers", "hydra_hf", "python"} <= set(content["versions"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is not JSON"), ("[]", "format None"), ('{"t2i/mean": 1}', "format None"), ('{"format": "x"}', "format 'x'"),
     ('{"format": "hydra_hf.suite/1", "suite": "a"}', "lacks or adds fields")],
)  # fmt: skip
def test_another_file_is_not_a_result(tmp_path, text, expected):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        SuiteResult.load(tmp_path / "x.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5"])
def test_a_score_is_a_finite_number(value):
    with pytest.raises(ValueError, match="finite"):
        replace(RESULT, scores={"a": value})


def test_scores_stand_below_the_papers_in_the_papers_units():
    text = report([RESULT])
    hydra = text.partition("HYDRA, table 3")[2].partition("###")[0].splitlines()
    assert "| HYDRA 7B | 0.97 | 0.81 | 0.86 | 90.22 | 91.83 | 86.40 | 0.52 | 0.68 | 0.53 |" in hydra
    assert "| **my/model** | 0.50 |  | 0.25 |  |  |  |  |  |  |" in hydra
    unimrg = text.partition("UniMRG, table 1")[2].partition("###")[0].splitlines()
    assert "| **my/model** |  |  |  |  |  | 25.00 |  |" in unimrg  # percent
    assert "HYDRA, table 2" not in text  # it has no score of ours
    assert "num_inference_steps 50; seed 3; number of prompts 553. A note." in text


def test_what_is_not_comparable_has_an_asterisk():
    own = replace(RESULT, is_comparable=False, scores={"geneval/overall": 0.25})
    assert "| **my/model** |  |  | 0.25* |" in report([own])
    assert "0.25*" in own.markdown()
    assert "*" not in RESULT.markdown()


def test_scores_of_several_suites_share_a_row_and_seeds_have_their_own():
    wise = replace(RESULT, suite="wise", scores={"wise/overall": 0.4, "wise/other": 1.0})
    text = report([RESULT, wise])
    assert "| **my/model** | 0.50 |  | 0.25 |  |  |  |  |  | 0.40 |" in text
    assert "| wise/other | 1 |" in text
    with pytest.raises(ValueError, match="Two results have geneval/two_object"):
        report([RESULT, RESULT])
    assert "**my/model (seed 4)**" in report([RESULT, replace(RESULT, seeds={"seed": 4})])


TOY = SuiteResult(
    "toy", "my/model", {"t2i/mean": 0.9, "vqa/mean": 0.5}, {"data": TOY_WORLD, "difficulty": 1}, {"seed": 0},
    {"num_questions": 8},
)  # fmt: skip


def test_scores_of_the_toy_world_have_a_table_of_their_own():
    video = replace(TOY, suite="video", scores={"t2v/right": 0.25})
    text = report([RESULT, TOY, video])
    assert text.count("my/model") == report([RESULT]).count("my/model") + 4  # a column and a protocol each
    toy = text.partition("### Toy world: suite toy\n\n")[2].partition("\n\n###")[0]
    assert toy == "| score | my/model |\n| --- | --- |\n| t2i/mean | 0.9 |\n| vqa/mean | 0.5 |"
    assert "### Toy world: suite video\n\n| score | my/model |\n| --- | --- |\n| t2v/right | 0.25 |" in text
    assert "- toy* of my/model: data toy world; difficulty 1; seed 0; number of num_questions 8." in text


def test_results_of_the_toy_world_are_columns_named_by_what_differs():
    other = replace(TOY, model="my/other", scores={"t2i/mean": 1.0})
    harder = replace(TOY, seeds={"seed": 4}, protocol=TOY.protocol | {"difficulty": 2})
    (head,) = (line for line in report([TOY, other, harder]).splitlines() if line.startswith("| score"))
    assert head == "| score | my/model, difficulty 1, seed 0 | my/other | my/model, difficulty 2, seed 4 |"
    assert "| vqa/mean | 0.5 |  | 0.5 |" in report([TOY, other, harder])
    with pytest.raises(ValueError, match="Two results of the suite toy have my/model and the same settings"):
        report([TOY, other, replace(TOY, scores={"t2i/mean": 0.1})])


def test_the_numbers_of_the_papers_agree_with_each_other():
    """Means that the papers print, computed from the cells of the same row."""
    for values in table("UniMRG, table 4").rows.values():
        assert sum(values[:6]) / 6 == pytest.approx(values[6], abs=0.01)
    averages = {"Show-o2 1.5B": 53.2, "HYDRA 1.5B": 63.2, "Show-o2 7B": 62.4, "HYDRA 7B": 68.9}
    for name, (mme, *others) in table("HYDRA, table 2").rows.items():
        assert (mme / 28 + sum(others)) / 8 == pytest.approx(averages[name], abs=0.06)
    for values in table("HYDRA-X, table 10").rows.values():
        assert sum(values[:6]) / 6 == pytest.approx(values[6], abs=0.011)
    weights = (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)  # of WISE
    for values in table("HYDRA-X, table 11").rows.values():
        assert sum(map(mul, weights, values)) == pytest.approx(values[6], abs=0.011)
    for *_, quality, semantic, total in table("HYDRA-X, table 6").rows.values():
        assert (4 * quality + semantic) / 5 == pytest.approx(total, abs=0.011)
    detailed, short = table("HYDRA-X, table 10").rows, table("HYDRA-X, table 6").rows
    assert detailed["HYDRA-X 7B"][6] == short["HYDRA-X 7B"][2]
    main, ablation = table("UniMRG, table 1").rows, table("UniMRG, table 3").rows
    assert ablation["+ segmentation generation"] == main["Harmon-1.5B + UniMRG"]
    for name, (*_, overall) in table("UniMRG, table 4").rows.items():
        assert main[name][5] == overall
