"""Clips and edits of the toy world as training data."""

from dataclasses import replace

import torch

from hydra_hf.data.seeds import hashed_generator
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.clips import CLIP_QUESTION_TYPES, ToyClips, check_clip
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.recipe import HydraStage
from toy_models import toy_processor, toy_video_pipeline


STAGE = HydraStage(name="clips", num_steps=9, tasks={"video_understand": 4, "video_generate": 4}, learning_rates={})


def bundles(data: ToyData, stage: HydraStage = STAGE) -> ToyBundles:
    return ToyBundles(data, toy_processor(), stage, seed=0)


def parts_of(message: dict) -> dict:
    return {part["type"]: part[part["type"]] for part in message["content"]}


def frames_of(samples: list) -> list[torch.Tensor]:
    parts = [part for sample in samples for message in sample.messages for part in message["content"]]
    return [part["video"] for part in parts if part["type"] == "video"]


def test_a_caption_asks_for_the_clip_that_the_assistant_gives():
    samples = bundles(ToyData()).samples("video_generate", hashed_generator(0, 0))
    clips = ToyClips(ToyWorld())
    torch_generator = hashed_generator(0, 0)
    torch.randint(1, (), generator=torch_generator)
    captions, expected = clips.sample_prompts(4, torch_generator)
    checker = ToyChecker(clips.world)
    for sample, caption, clip in zip(samples, captions, expected, strict=True):
        user, assistant = map(parts_of, sample.messages)
        assert user["text"] in (caption, "")
        assert assistant["video"].shape == (3, 17, 64, 64)
        assert check_clip(checker, assistant["video"], clip).is_right


def test_questions_of_a_clip_follow_each_other_and_the_clip_is_in_the_first_turn():
    data = ToyData(questions_per_image=3)
    for sample in bundles(data).samples("video_understand", hashed_generator(0, 0)):
        roles = [message["role"] for message in sample.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= min(3, len(CLIP_QUESTION_TYPES))
        assert set(parts_of(sample.messages[0])) == {"video", "text"}
        assert all(set(parts_of(message)) == {"text"} for message in sample.messages[1:])


def test_the_clips_of_a_task_have_one_length_in_a_step():
    made = bundles(ToyData(clip_lengths=(17, 17, 9, 5)))
    lengths = []
    for step in range(24):
        (length,) = {
            frames.shape[1] for frames in frames_of(made.samples("video_generate", hashed_generator(0, step)))
        }
        lengths.append(length)
    assert set(lengths) == {17, 9, 5}
    assert lengths.count(17) > lengths.count(5)


def test_captions_are_dropped_for_guidance():
    stage = replace(STAGE, tasks={"video_generate": 100}, drop_prompt=0.3)
    samples = bundles(ToyData(clip_lengths=(5,)), stage).samples("video_generate", hashed_generator(0, 0))
    assert 15 < [parts_of(sample.messages[0])["text"] for sample in samples].count("") < 45


def test_held_out_clips_are_of_the_other_split():
    clips = ToyClips(ToyWorld())
    for is_held_out, split in ((False, "train"), (True, "test")):
        generator = hashed_generator(0, 0)
        torch.randint(1, (), generator=generator)
        expected, _ = clips.sample_prompts(4, generator, split=split)
        made = bundles(ToyData(is_held_out=is_held_out), replace(STAGE, drop_prompt=0.0))
        samples = made.samples("video_generate", hashed_generator(0, 0))
        assert [parts_of(sample.messages[0])["text"] for sample in samples] == expected


def test_clips_and_edits_become_batches():
    stage = replace(STAGE, tasks={"video_understand": 1, "video_generate": 2, "edit": 2}, drop_prompt=0.0)
    bundle = ToyBundles(ToyData(clip_lengths=(9,)), toy_video_pipeline().processor, stage, seed=0)[0]
    grids = {task: bundle[task]["image_grid_thw"].tolist() for task in stage.tasks}
    assert grids == {"video_understand": [[9, 4, 4]], "video_generate": [[9, 4, 4]] * 2, "edit": [[1, 4, 4]] * 4}
    assert bundle["video_generate"]["is_generated"].tolist() == [True, True]
    assert bundle["edit"]["num_sources"].tolist() == [0, 1, 0, 1]
    assert (bundle["video_understand"]["mm_token_type_ids"] == 2).sum() == 1 + 3 * 16
