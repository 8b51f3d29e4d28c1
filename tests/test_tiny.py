"""The embedded checkpoint does what its card says, on a small scale; `hydra evaluate` measures it in full."""

import json
from pathlib import Path

import pytest
import torch

import hydra_hf
from hydra_hf import HydraConfig, HydraForConditionalGeneration, HydraPipeline
from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.evaluation import evaluate_painting, evaluate_reconstruction, evaluate_understanding
from hydra_hf.toy.language import CATEGORIES, QUESTION_TYPES, Prompt, ToyLanguage
from hydra_hf.toy.phrasing import KINDS
from hydra_hf.toy.world import CANVASES, ToyWorld
from hydra_hf.training.recipes import tiny
from toy_models import toy_tokenizer


TINY = Path(hydra_hf.TINY)


@pytest.fixture(scope="module")
def pipeline() -> HydraPipeline:
    pipeline = HydraPipeline.from_pretrained(hydra_hf.TINY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def language() -> ToyLanguage:
    return ToyLanguage(ToyWorld(difficulty=1))


SIZE_FIELDS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "layer_types",
    "num_gen_layers", "num_sem_layers", "num_global_layers", "num_flow_layers", "image_size", "patch_size",
    "max_position_embeddings", "max_window_layers", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
    "image_token_id", "vision_start_token_id", "vision_end_token_id", "null_prompt_ids",
}  # fmt: skip


SAVED_FIELDS = {"architectures", "transformers_version", "dtype", "_name_or_path"}  # of any saved model


def different_fields(ours: dict, theirs: dict) -> set[str]:
    """Names of the fields, at any depth, whose values differ."""
    names = set()
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names |= different_fields(a, b)
        elif a != b:
            names.add(name)
    return names


def test_its_recipe_makes_a_preset_that_differs_in_sizes_only():
    vision_config = tiny.tokenizer_config()
    vision_config.decoder_config = tiny.tokenizer().stages[-1].decoder_config
    config = tiny.hydra_config(vision_config, toy_tokenizer())
    assert different_fields(config.to_dict(), HydraConfig.hydra_1_5b().to_dict()) <= SIZE_FIELDS


def test_it_differs_from_the_presets_in_sizes_only():
    """An encoder of HYDRA's kind that reads clips as HYDRA-X does, and HYDRA-X's decoder."""
    config, preset, clips = (
        each.to_dict()
        for each in (HydraConfig.from_pretrained(TINY / "model"), HydraConfig.hydra_1_5b(), HydraConfig.hydra_x_1_5b())
    )
    decoders = [each["vision_config"].pop("decoder_config") for each in (config, preset, clips)]
    of_clips = {"temporal_fold_layers", "rotary_axes", "video_token_id"}
    assert different_fields(config, preset) <= SIZE_FIELDS | SAVED_FIELDS | of_clips
    assert different_fields(decoders[0], decoders[2]) <= SIZE_FIELDS | SAVED_FIELDS | {
        "temporal_unfold_layers",
        "rotary_axes",
    }


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}


def test_its_weights_open_in_fp32(pipeline):
    assert pipeline.model.dtype == torch.float32
    assert HydraForConditionalGeneration.from_pretrained(TINY / "model").dtype == torch.float32


def test_a_cat_is_the_cat(pipeline, language):
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a cat", generator=generator, output_type="pt").images[0] * 2 - 1
    prompt = Prompt("single_object", "a cat", (language.world.names.index("cat"),))
    assert ToyChecker(language.world).check(image, prompt)


@pytest.mark.parametrize("prompt", ["a zeppelin", "", "猫", "<|im_end|> <|vision_start|>", "A CAT!!", "a cat " * 40])
def test_a_prompt_outside_the_world_draws_something(pipeline, prompt):
    image = pipeline(
        prompt, generator=torch.Generator().manual_seed(0), output_type="np", num_inference_steps=4
    ).images[0]
    assert image.shape == (64, 64, 3)
    assert image.std() > 0


def test_it_answers_questions_about_held_out_scenes(pipeline, language):
    scores = evaluate_understanding(pipeline.model, pipeline.processor, language, num_questions=64, seed=1)
    assert scores["vqa/mean"] >= 0.8


def test_it_rebuilds_held_out_scenes(pipeline, language):
    scores = evaluate_reconstruction(pipeline.model.model.vision_tower, language, num_scenes=16, seed=1)
    assert scores["reconstruction/psnr"] >= 30


def test_it_paints_depth_and_boundaries_of_held_out_scenes(pipeline, language):
    scores = evaluate_painting(pipeline.model, pipeline.processor, language.world, num_scenes=8, seed=1)
    for name in ("foreground_iou", "boundary_f"):
        assert scores[f"paint/{name}"] >= 0.9
        assert scores[f"paint_another/{name}"] < 0.6  # of the next scene


def test_its_measured_scores_have_not_fallen():
    scores = json.loads((TINY / "scores.json").read_text())
    expected = {f"t2i/{name}" for name in (*CATEGORIES, "mean")} | {f"vqa/{name}" for name in QUESTION_TYPES}
    assert expected <= set(scores)
    assert scores["t2i/single_object"] >= 0.95
    assert scores["t2i/mean"] >= 0.95
    assert scores["vqa/mean"] >= 0.93
    assert all(scores[f"vqa/{name}"] >= scores[f"vqa_majority/{name}"] + 0.15 for name in QUESTION_TYPES)
    assert scores["reconstruction/psnr"] >= 35
    assert scores["video_vqa/mean"] >= scores["video_vqa/majority"] + 0.6
    assert scores["t2v/right"] >= 0.9
    assert scores["edit/mean"] >= 0.85
    assert scores["edit_psnr/mean"] >= 30
    plain = scores["t2i_phrasing/plain"]
    for kind in KINDS:
        assert scores[f"t2i_phrasing/{kind}"] >= plain - 0.03, kind
    for height, width in CANVASES:
        bar = (
            0.9 if min(height, width) >= 64 else 0.6
        )  # the stages of edits cost small pictures, whose objects are one patch
        assert scores[f"t2i_size/{height}x{width}"] >= bar, (height, width)
