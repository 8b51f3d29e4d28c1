"""`examples/hydra_x_table.py`: its rows are comparable, and what exists is not made again."""

import json
from argparse import Namespace
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import hydra_hf
from hydra_hf import HydraConfig, HydraTokModel
from hydra_hf.toy.clips import ToyClips, render_clips
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.recipes import tiny
from hydra_hf.training.vision_tower_trainer import create_stage_model


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "examples" / "hydra_x_table.py"
    spec = spec_from_file_location("hydra_x_table", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes(script, tmp_path_factory):
    """Of an untrained encoder of images."""
    init = tmp_path_factory.mktemp("images")
    config = tiny.tokenizer_config()
    config.decoder_config = tiny.tokenizer().stages[-1].decoder_config
    torch.manual_seed(0)
    HydraTokModel(config).save_pretrained(init / "model")
    options = Namespace(num_steps=3, init=str(init))
    return {name: script.tokenizer_recipe(options, name, seed=1) for name in script.TOKENIZERS}


def test_tokenizers_differ_in_attention_and_folds_alone(recipes):
    first = recipes["full"]
    for recipe in recipes.values():
        own, others = recipe.config.to_dict(), first.config.to_dict()
        changed = {name for name in own if own[name] != others[name]}
        assert changed <= {"temporal_attention", "temporal_fold_layers"}
        own, others = (each.stages[0].decoder_config.to_dict() for each in (recipe, first))
        changed = {name for name in own if own[name] != others[name]}
        assert changed <= {"temporal_attention", "temporal_unfold_layers"}
        stages = [replace(each.stages[0], decoder_config=first.stages[0].decoder_config) for each in (recipe, first)]
        assert stages[0] == stages[1]
        assert (recipe.seed, recipe.init, stages[0].num_steps) == (1, first.init, 3)


@torch.no_grad()
def test_all_tokenizers_start_from_the_latents_of_images_of_one_encoder_and_are_trained_as_a_whole(recipes):
    world = ToyWorld(difficulty=1)
    clips = render_clips(world, ToyClips(world).sample(2, torch.Generator().manual_seed(0), num_frames=9))
    start = HydraTokModel.from_pretrained(recipes["full"].init, dtype=torch.float32).eval()
    expected = start.encode(clips[:, :, 0]).latent
    for recipe in recipes.values():
        (stage,) = recipe.stages
        model = create_stage_model(recipe, stage, start).model.eval()
        torch.testing.assert_close(model.encode(clips[:, :, 0]).latent, expected, atol=1e-4, rtol=1e-4)
        assert model.decode(model.encode(clips).latent).sample.shape == clips.shape
        names = [name for name, _ in model.named_parameters() if not stage.learning_rate_of(f"model.{name}")]
        assert all(name.startswith("sem_vit.") for name in names)


def test_rows_of_edits_differ_in_interaction_alone_and_color_fields_in_data_and_the_loss_of_pixels(script, tmp_path):
    HydraConfig.from_pretrained(hydra_hf.TINY, subfolder="model").vision_config.save_pretrained(tmp_path / "tokenizer")
    options = Namespace(
        init=hydra_hf.TINY, tokenizer=str(tmp_path / "tokenizer"), out=tmp_path, num_edit_steps=3, num_edits=1
    )
    recipes = {
        (part, name): script.edit_recipe(options, part, name, 1)
        for part in ("edits", "color_fields")
        for name in script.EDITING
    }
    (plain,) = recipes["edits", "interaction"].stages
    (fields,) = recipes["color_fields", "interaction"].stages
    assert fields.data == replace(plain.data, color_field_share=1.0)
    assert (plain.loss_weights.pixels, fields.loss_weights.pixels) == (0.0, 1.0)
    assert replace(fields, data=plain.data, loss_weights=plain.loss_weights) == plain
    for (part, name), recipe in recipes.items():
        assert recipe.stages == recipes[part, "interaction"].stages
        assert recipe.config.use_source_interaction == script.EDITING[name]


def test_a_score_that_exists_is_not_made_again(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = []

    def run(options, name, seed):
        calls.append((name, seed))
        return {"score": float(seed)}

    monkeypatch.setitem(script.PARTS, "part", script.Part(("a", "b"), ("score",), run))
    for seeds in (["0"], ["0", "2"]):
        script.main(["--out", str(tmp_path), "--parts", "part", "--seeds", *seeds])
    assert calls == [("a", 0), ("b", 0), ("a", 2), ("b", 2)]
    table = json.loads((tmp_path / "table.json").read_text())
    assert table == {"part": {name: [{"score": 0.0}, {"score": 2.0}] for name in "ab"}}
    assert "| a | 2 | 1.000 ± 1.414 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 0


@pytest.mark.slow
def test_a_tokenizer_is_trained_and_scored(script, tmp_path):
    options = Namespace(out=tmp_path, init=hydra_hf.TINY, num_steps=1, num_clips=2, num_images=2)
    scores = script.scores_of(options, "tokenizer", "tubelet_two_folds", 0)
    assert set(scores) == set(script.PARTS["tokenizer"].columns)
    assert all(0 < scores[name] < 60 for name in ("clip/psnr", "image/psnr"))
