"""The recipe of HYDRA-X on the embedded checkpoint: what it starts from, what it trains, and a run of it at a smaller size."""

import json
from dataclasses import replace

import pytest
import torch

from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor, HydraTokModel, PixelViTDecoderConfig
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.clips import clip_corpus
from hydra_hf.toy.edits import edit_corpus
from hydra_hf.toy.text_tokenizer import words_of
from hydra_hf.training.hydra_trainer import create_model, train_hydra
from hydra_hf.training.recipe import freeze_unnamed
from hydra_hf.training.recipes import tiny, tiny_x
from toy_models import VIDEO_TOK_CONFIG, random_pipeline, toy_pipeline, toy_processor, toy_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained model of images, of the embedded one's sizes."""
    folder = tmp_path_factory.mktemp("base")
    vision_config = tiny.tokenizer_config()
    vision_config.decoder_config = tiny.tokenizer().stages[-1].decoder_config
    random_pipeline(tiny.hydra_config(vision_config, toy_tokenizer()), toy_processor()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    """`tiny_x.hydra` on an untrained tokenizer for clips."""
    folder = tmp_path_factory.mktemp("tokenizer")
    config = tiny.tokenizer_config()
    config.temporal_fold_layers = [0, 1]
    config.decoder_config = PixelViTDecoderConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=16, temporal_unfold_layers=[1, 2]
    )  # fmt: skip
    HydraTokModel(config).save_pretrained(folder)
    return tiny_x.hydra(str(base), str(folder))


@pytest.fixture(scope="module")
def model(recipe):
    return create_model(recipe)


def test_the_model_is_that_of_images_with_more_words_and_another_tokenizer(base, recipe, model):
    of_images = HydraForConditionalGeneration.from_pretrained(base, subfolder="model")
    old, new = of_images.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    assert len(new) == len(recipe.processor.tokenizer) > len(old)
    assert model.lm_head.weight is new
    torch.testing.assert_close(new[len(old) :].mean(0), old.mean(0), rtol=0, atol=1e-3)
    heads = (each.vision_head.in_proj.weight for each in (model, of_images))
    assert torch.equal(*heads)
    assert model.config.text_config.vocab_size == recipe.config.text_config.vocab_size == len(new)
    assert model.config.video_token_id == recipe.config.video_token_id == 6
    assert model.config.vision_config.temporal_fold_layers == [0, 1]


def test_the_processor_reads_clips_and_knows_their_words_and_all_old_ones(base, recipe, model):
    processor = recipe.processor
    known = HydraProcessor.from_pretrained(base, subfolder="processor")
    assert processor.video_token_id == model.config.video_token_id
    assert processor.image_token_id == model.config.image_token_id == known.image_token_id
    assert set(processor.known_words) == {*known.known_words, *words_of([*clip_corpus(), *edit_corpus()])}
    assert processor.unknown_words("please move the cat to the left, then it moves down") == ["it"]
    assert processor.video_length((17, 4, 4)) == 1 + 5 * 16
    ids = processor.tokenizer("which way does the cat move?")["input_ids"]
    assert len(ids) == 7


def test_every_stage_except_those_of_edits_alone_has_all_tasks_and_none_trains_what_makes_latents(recipe, model):
    for stage in recipe.stages:
        everything = {"understand", "generate", "video_understand", "video_generate", "edit"} < set(stage.tasks)
        assert everything == (stage.name not in ("copies", "background", "middle"))
        freeze_unnamed(model, stage)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tower = {name for name in trained if name.startswith("model.vision_tower.")}
        allowed = ("model.vision_tower.sem_vit", "model.vision_tower.bottleneck.semantic_up_proj")
        assert all(name.startswith(allowed) for name in tower)
        assert {
            "model.language_model.embed_tokens.weight",
            "model.vision_tower.sem_vit.layers.0.mlp.fc1.weight",
        } < trained


def test_the_interaction_of_edits_can_be_left_out_for_comparison(recipe):
    config = recipe.config.__class__.from_dict({**recipe.config.to_dict(), "use_source_interaction": False})
    assert recipe.config.use_source_interaction
    assert not create_model(replace(recipe, config=config)).config.use_source_interaction


def test_all_tasks_train_together_and_the_finished_pipeline_draws_clips_and_edits(tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "base")
    HydraTokModel(VIDEO_TOK_CONFIG).save_pretrained(tmp_path / "tokenizer")
    recipe = tiny_x.hydra(str(tmp_path / "base"), str(tmp_path / "tokenizer"))
    stage = recipe.stages[0]
    data = replace(stage.data, canvases=((64, 64),), clip_lengths=(5,), questions_per_image=1)
    stage = replace(stage, num_steps=2, tasks=dict.fromkeys(stage.tasks, 1), data=data, held_out=None, warmup_steps=1,
                    muon_scale=0.0, mixed_precision="no")  # fmt: skip
    recipe = replace(recipe, stages=(stage,), log_every=1, sample_prompts=("a cat",), num_inference_steps=1)
    final = train_hydra(recipe, tmp_path / "run")
    first, *_ = map(json.loads, (tmp_path / "run" / "video" / "log.jsonl").read_text().splitlines())
    losses = {f"{task}/{'language' if task.endswith('understand') else 'flow'}" for task in stage.tasks}
    assert all(first[loss] > 0 for loss in losses)
    pipeline = HydraPipeline.from_pretrained(final)
    clip = pipeline("a cat moves up", num_frames=5, num_inference_steps=1, output_type="pt").frames
    assert clip.shape == (1, 5, 3, 64, 64)
    picture = pipeline("a cat", num_inference_steps=1).images[0]
    assert pipeline("remove the cat", image=picture, num_inference_steps=1).images[0].size == (64, 64)
