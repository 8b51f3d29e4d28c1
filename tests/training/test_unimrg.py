"""UniMRG of HYDRA: what its mixtures train, what is painted while they do, and that a run goes on where it was."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraConfig, HydraForConditionalGeneration
from hydra_hf.toy.batches import ToyData
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipe import freeze_unnamed
from hydra_hf.training.recipes import tiny, unimrg
from toy_models import toy_pipeline


PAINTED = ("reconstruct", "depth", "segment")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    toy_pipeline().save_pretrained(folder)
    return str(folder)


def small(base: str, mixture: str = "unimrg", **changes):
    """`tiny.unimrg` on a random model, two samples of a task, three steps."""
    recipe = tiny.unimrg(base, mixture)
    own = {
        "num_steps": 3, "tasks": unimrg.tasks_of(mixture, 2), "data": ToyData(), "held_out": ToyData(is_held_out=True),
        "num_held_out": 2, "muon_scale": 0.0, "warmup_steps": 1, "mixed_precision": "no",
    }  # fmt: skip
    stage = replace(recipe.stages[0], **{**own, **changes})
    return replace(recipe, stages=(stage,), log_every=1, save_every=2, sample_every=3, sample_prompts=("a cat",))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("run"), []
    train_hydra(small(base), folder, on_stage=said.append)
    return folder, said


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_every_step_has_as_many_samples_of_each_task():
    assert unimrg.tasks_of("unimrg", 16) == dict.fromkeys(("understand", *PAINTED), 16)
    for mixture in unimrg.MIXTURES:
        tasks = unimrg.tasks_of(mixture, 4)
        assert tasks["understand"] == 4
        assert set(tasks) <= set(TASKS)


def test_an_unknown_mixture_is_refused():
    with pytest.raises(ValueError, match="mixture='all' must be one of"):
        unimrg.hydra_1_5b(mixture="all")


@pytest.mark.parametrize("make", [unimrg.hydra_1_5b, unimrg.hydra_7b])
def test_the_recipes_train_what_the_paper_trains(make):
    recipe = make()
    with torch.device("meta"):
        model = HydraForConditionalGeneration(recipe.config)
    freeze_unnamed(model, recipe.stages[0])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    for name in frozen:
        assert name.startswith(("model.vision_tower.gen_vit", "model.vision_tower.bottleneck", "model.vision_tower.pixel_decoder",
                                "model.language_model.embed_tokens")), name  # fmt: skip
    assert not any("gen_vit" in name or "down_proj.weight" in name and "bottleneck" in name for name in trained)
    assert recipe.stages[0].learning_rate_of("model.language_model.layers.0.mlp.up_proj.weight") == 1e-5


def test_what_is_frozen_stays_and_all_else_moves(base, finished):
    folder, said = finished
    model = HydraForConditionalGeneration.from_pretrained(base, subfolder="model")
    freeze_unnamed(model, small(base).stages[0])
    after = HydraForConditionalGeneration.from_pretrained(folder / "unimrg" / "final", subfolder="model")
    for (name, old), (_, new) in zip(model.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(old, new) != old.requires_grad, name
    (listed,) = [text for text in said if text.startswith("trained: ")]
    assert "vision_head" in listed.splitlines()[0]
    assert "model.vision_tower.gen_vit" in listed.splitlines()[1]


def test_losses_are_logged_by_task_and_held_out_maps_are_painted(finished):
    folder = finished[0] / "unimrg"
    rows = list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
    assert all(f"{task}/flow" in rows[0] for task in PAINTED)
    assert "understand/language" in rows[0]
    (share,) = [row["held_out/segment/white_share"] for row in rows if "held_out/segment/white_share" in row]
    assert 0 <= share <= 1
    assert all((folder / f"{task}-000003.png").exists() for task in PAINTED)


def test_a_killed_run_ends_as_the_uninterrupted_one(base, finished, tmp_path):
    folder = tmp_path / "unimrg"
    folder.mkdir()
    whole = finished[0] / "unimrg"
    (whole / "checkpoint-2").rename(folder / "checkpoint-2")
    train_hydra(small(base), tmp_path)
    torch.testing.assert_close(weights_of(folder / "final"), weights_of(whole / "final"), rtol=0, atol=0)


def test_a_mixture_of_questions_alone_leaves_the_vision_head(base, tmp_path):
    final = train_hydra(small(base, "sft"), tmp_path)
    before, after = (
        HydraForConditionalGeneration.from_pretrained(folder, subfolder="model") for folder in (base, final)
    )
    assert torch.equal(before.vision_head.out_proj.weight.bfloat16(), after.vision_head.out_proj.weight.bfloat16())
    first, last = (model.model.language_model.layers[0].mlp.up_proj.weight for model in (before, after))
    assert not torch.equal(first.bfloat16(), last)


def test_adapters_are_saved_with_the_heads_and_are_a_part_of_the_size(base, tmp_path):
    train_hydra(small(base, lora_rank=2), tmp_path)
    adapter = load_file(tmp_path / "unimrg" / "final" / "adapter" / "adapter_model.safetensors")
    assert any(".vision_head." in name and ".lora_" not in name for name in adapter)
    assert {name.split(".lora_")[0] for name in adapter if ".lora_" in name}
    assert sum(map(torch.numel, adapter.values())) < sum(
        map(torch.numel, weights_of(tmp_path / "unimrg" / "final").values())
    )


def test_the_embedded_model_is_the_default():
    assert HydraConfig.from_pretrained(tiny.unimrg().init, subfolder="model").text_config.num_hidden_layers == 6


@pytest.mark.slow
def test_the_example_trains_on_the_toy_world(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "unimrg_hydra.py"
    spec = importlib.util.spec_from_file_location("unimrg_hydra", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--num_steps", "1", "--lora_rank", "2", "--out", str(tmp_path)])
    assert (tmp_path / "unimrg" / "final" / "adapter" / "adapter_config.json").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "final")
