"""Clips and edits of the toy world as training data, and the recipe that trains on them."""

from dataclasses import replace

import pytest
import torch

from hydra_hf.data.seeds import hashed_generator
from hydra_hf.modeling import (
    HydraForConditionalGeneration,
    HydraProcessor,
    HydraTokModel,
    PixelViTDecoderConfig,
)
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.clips import CLIP_QUESTION_TYPES, ToyClips, check_clip, clip_corpus
from hydra_hf.toy.edits import edit_corpus
from hydra_hf.toy.text_tokenizer import words_of
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.hydra_trainer import create_model
from hydra_hf.training.recipe import HydraStage, freeze_unnamed
from hydra_hf.training.recipes import tiny, tiny_x
from toy_models import toy_processor


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


# The recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """`tiny_x.hydra` on an untrained tokenizer for clips."""
    folder = tmp_path_factory.mktemp("tokenizer")
    config = tiny.tokenizer_config()
    config.temporal_fold_layers = [0, 1]
    config.decoder_config = PixelViTDecoderConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=16, temporal_unfold_layers=[1, 2]
    )  # fmt: skip
    HydraTokModel(config).save_pretrained(folder)
    return tiny_x.hydra(tokenizer=str(folder))


@pytest.fixture(scope="module")
def model(recipe):
    return create_model(recipe)


def test_the_model_is_the_embedded_one_with_more_words_and_another_tokenizer(recipe, model):
    embedded = HydraForConditionalGeneration.from_pretrained(tiny.EMBEDDED, subfolder="model")
    old, new = embedded.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    assert len(new) == len(recipe.processor.tokenizer) > len(old)
    assert model.lm_head.weight is new
    torch.testing.assert_close(new[len(old) :].mean(0), old.mean(0), rtol=0, atol=1e-3)
    heads = (each.vision_head.in_proj.weight for each in (model, embedded))
    assert torch.equal(*heads)
    assert model.config.text_config.vocab_size == recipe.config.text_config.vocab_size == len(new)
    assert model.config.video_token_id == recipe.config.video_token_id == 6
    assert model.config.vision_config.temporal_fold_layers == [0, 1]


def test_the_processor_reads_clips_and_knows_their_words_and_all_old_ones(recipe, model):
    processor = recipe.processor
    embedded = HydraProcessor.from_pretrained(tiny.EMBEDDED, subfolder="processor")
    assert processor.video_token_id == model.config.video_token_id
    assert processor.image_token_id == model.config.image_token_id == embedded.image_token_id
    assert set(processor.known_words) == {*embedded.known_words, *words_of([*clip_corpus(), *edit_corpus()])}
    assert processor.unknown_words("please move the cat to the left, then it moves down") == ["it"]
    assert processor.video_length((17, 4, 4)) == 1 + 5 * 16
    ids = processor.tokenizer("which way does the cat move?")["input_ids"]
    assert len(ids) == 7


def test_every_stage_has_all_tasks_and_never_trains_what_makes_latents(recipe, model):
    for stage in recipe.stages:
        assert {"understand", "generate", "video_understand", "video_generate", "edit"} < set(stage.tasks)
        freeze_unnamed(model, stage)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tower = {name for name in trained if name.startswith("model.vision_tower.")}
        allowed = ("model.vision_tower.sem_vit", "model.vision_tower.bottleneck.semantic_up_proj")
        assert all(name.startswith(allowed) for name in tower)
        assert {
            "model.language_model.embed_tokens.weight",
            "model.vision_tower.sem_vit.layers.0.mlp.fc1.weight",
        } < trained
