"""Scores of clips and edits: what is counted, and what true, frozen, foreign and unedited pictures get."""

from functools import cache

import pytest
import torch
from torch import Tensor

from hydra_hf.pipelines.answering import answer
from hydra_hf.toy import evaluation_x
from hydra_hf.toy.clips import ToyClips, render_clips
from hydra_hf.toy.edits import EDIT_KINDS, ToyEdits, target_scenes
from hydra_hf.toy.evaluation_x import evaluate_edits, evaluate_video_generation, evaluate_video_understanding
from hydra_hf.toy.world import ToyWorld
from toy_models import toy_video_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return toy_video_pipeline()


@cache
def clips() -> ToyClips:
    return ToyClips(ToyWorld())


@cache
def edits() -> ToyEdits:
    return ToyEdits(ToyWorld())


def test_answers_are_counted_by_type_next_to_the_commonest_ones(pipeline):
    scores = evaluate_video_understanding(pipeline.model, pipeline.processor, clips(), 12, seed=1, batch_size=5)
    _, asked = clips().sample_turns(12, torch.Generator().manual_seed(1), split="test")
    types = {question.type for question, *_ in asked}
    assert set(scores) == {*(f"{name}/{kind}" for name in ("video_vqa", "video_vqa_majority") for kind in types),
                           "video_vqa/mean", "video_vqa/majority"}  # fmt: skip
    assert scores["video_vqa/mean"] == 0
    assert scores["video_vqa/majority"] >= len(types) / 12  # each type's commonest answer is right once


def test_clips_and_images_are_answered_in_one_batch_as_alone(pipeline):
    frames = render_clips(clips().world, clips().sample(2, torch.Generator().manual_seed(0), num_movers=(1,)))
    first, second = (pipeline.processor.image_processor.postprocess(each.transpose(0, 1)) for each in frames)
    shown, questions = [first, second[0], second], ["what moves?", "what do you see?", "which way does the cat move?"]
    parts = pipeline.model, pipeline.processor
    together = answer(*parts, shown, questions, max_new_tokens=4)
    assert together == [answer(*parts, [each], [text], max_new_tokens=4)[0] for each, text in zip(shown, questions)]


def test_a_random_model_draws_no_clip_right_and_a_frozen_one_shows_its_objects_alone(pipeline):
    scores = evaluate_video_generation(pipeline, clips(), 6, num_inference_steps=1, batch_size=4)
    keys = ("objects", "directions", "order", "relation", "right", "1_movers", "2_movers")
    assert {f"{name}/{key}" for name in ("t2v", "t2v_frozen") for key in keys} == set(scores)
    assert not any(scores[f"t2v/{key}"] for key in keys)
    assert scores["t2v_frozen/objects"] == 1
    assert scores["t2v_frozen/directions"] == scores["t2v_frozen/right"] == 0


def test_true_clips_are_all_right_and_those_of_other_captions_are_not(pipeline, monkeypatch):
    expected = clips().sample_prompts(8, torch.Generator().manual_seed(0), split="test", num_frames=9)[1]
    frames = list(render_clips(clips().world, expected))
    for shift, right in ((0, 1.0), (1, 0.0)):
        monkeypatch.setattr(evaluation_x, "draw_clips", lambda *_, shift=shift, **__: frames[shift:] + frames[:shift])
        scores = evaluate_video_generation(pipeline, clips(), 8, num_frames=9)
        assert scores["t2v/right"] == scores["t2v/1_movers"] == scores["t2v/2_movers"] == right


def test_an_unedited_picture_follows_no_edit_and_a_random_one_neither(pipeline):
    scores = evaluate_edits(pipeline, edits(), 2, num_inference_steps=1, batch_size=3)
    rows, names = (*EDIT_KINDS, "new_wording", "mean"), ("edit", "edit_decoded", "edit_unedited")
    assert {f"{name}{unit}/{row}" for name in names for unit in ("", "_psnr") for row in rows} == set(scores)
    assert scores["edit/mean"] == scores["edit_unedited/mean"] == scores["edit_decoded/mean"] == 0
    assert scores["edit_unedited_psnr/mean"] == 100 > scores["edit_psnr/mean"]


def test_true_targets_follow_every_edit_and_keep_the_rest(pipeline, monkeypatch):
    def draw(pipeline, edits: ToyEdits, sampled: list, *_) -> Tensor:
        return edits.world.render(target_scenes(sampled))

    monkeypatch.setattr(evaluation_x, "draw_edits", draw)
    scores = evaluate_edits(pipeline, edits(), 3)
    assert {scores[f"edit/{row}"] for row in (*EDIT_KINDS, "new_wording", "mean")} == {1.0}
    assert scores["edit_psnr/mean"] == 100
