"""The real VLMEvalKit asks the embedded checkpoint about a local file. Needs the extra `vlmevalkit`."""

import pytest
import torch
from toy_tasks import embedded_pipeline, png_text, toy_questions

from hydra_hf import TINY


pd = pytest.importorskip("pandas")
pytest.importorskip("vlmeval")

from hydra_hf.evaluation.suites.vlmevalkit import run  # noqa: E402
from hydra_hf.evaluation.suites.vlmevalkit_model import HydraVLM  # noqa: E402


NUM_ROWS = 6


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """Questions with yes or no as answers A and B, in the file ToyMCQ.tsv of the folder that VLMEvalKit reads."""
    rows = [row for row in toy_questions(64) if row["answer"] in ("yes", "no")][:NUM_ROWS]
    assert len(rows) == NUM_ROWS
    table = [
        {"index": index, "image": png_text(row["image"]), "question": row["question"], "A": "yes", "B": "no",
         "answer": "A" if row["answer"] == "yes" else "B", "category": "toy"}
        for index, row in enumerate(rows)
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    pd.DataFrame(table).to_csv(tmp_path / "data" / "ToyMCQ.tsv", sep="\t", index=False)
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    yield table
    torch.set_grad_enabled(True)  # importing VLMEvalKit turns gradients off for the process


def test_the_harness_scores_what_the_model_answers_and_resumes(questions, tmp_path, monkeypatch):
    asked, of_model = [], HydraVLM.generate_inner

    def look(self, message, dataset=None):
        given = of_model(self, message, dataset)
        asked.append(([part["type"] for part in message], given))
        return given

    monkeypatch.setattr(HydraVLM, "generate_inner", look)
    options = {"tasks": "ToyMCQ", "folder": tmp_path / "out", "max_new_tokens": 8}
    result = run(embedded_pipeline(), TINY, **options)
    assert len(asked) == NUM_ROWS
    assert all(kinds == ["image", "text"] for kinds, _ in asked)
    assert 0 <= result.scores["ToyMCQ/Overall"] <= 1
    assert result.counts == {"rows of ToyMCQ": NUM_ROWS}
    assert result.protocol["judge"] == "exact_matching"
    assert not result.is_comparable
    (file,) = (tmp_path / "out").rglob("hydra_ToyMCQ.xlsx")
    kept = pd.read_excel(file, keep_default_na=False)["prediction"]  # an empty answer is an empty cell
    assert [str(text) for text in kept] == [given for _, given in asked]
    assert run(embedded_pipeline(), TINY, **options).scores == result.scores
    assert len(asked) == NUM_ROWS


def test_an_unknown_data_set_is_an_error(questions, tmp_path):
    with pytest.raises(ValueError, match="no data set NoSuchData"):
        run(embedded_pipeline(), TINY, tasks="NoSuchData", folder=tmp_path / "out")
