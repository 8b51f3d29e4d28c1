from collections import defaultdict

import pytest
import torch
from PIL import Image

from hydra_hf.toy.evaluation import answer, evaluate_understanding
from hydra_hf.toy.language import QUESTION_TYPES
from toy_models import toy_language, toy_pipeline


@pytest.fixture(scope="module")
def parts():
    pipeline = toy_pipeline()
    return pipeline.model, pipeline.processor


def test_scores_have_their_keys_and_majority_counts_the_commonest_answer_of_each_type(parts):
    scores = evaluate_understanding(*parts, toy_language(), 24, seed=3, batch_size=10)
    _, questions = toy_language().sample_questions(24, torch.Generator().manual_seed(3), split="test")
    answers = defaultdict(list)
    for question in questions:
        answers[question.type].append(question.answer)
    kinds = ("vqa", "vqa_majority")
    assert set(scores) == {*(f"{kind}/{name}" for kind in kinds for name in answers), "vqa/mean", "vqa/majority"}
    assert set(answers) <= set(QUESTION_TYPES)
    commonest = sum(max(given.count(word) for word in given) for given in answers.values())
    assert scores["vqa/majority"] == commonest / 24
    weighted = sum(scores[f"vqa/{name}"] * len(given) for name, given in answers.items())
    assert scores["vqa/mean"] == pytest.approx(weighted / 24)


def test_answers_do_not_depend_on_the_batch(parts):
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "white")]
    questions = ["what is in the picture?", "is there a cat?"]
    together = answer(*parts, pictures, questions, max_new_tokens=5)
    alone = [
        answer(*parts, [picture], [question], max_new_tokens=5)[0] for picture, question in zip(pictures, questions)
    ]
    assert together == alone


def test_as_many_pictures_as_questions_are_expected(parts):
    with pytest.raises(ValueError, match="1 images and 2 questions"):
        answer(*parts, [Image.new("RGB", (64, 64))], ["what?", "why?"])


def test_an_empty_question_is_refused(parts):
    with pytest.raises(ValueError, match=r"\[0\] are empty"):
        answer(*parts, [Image.new("RGB", (64, 64))], ["  "])
