"""The contract of other unified models: what a bundle becomes, the example of it, and the command line."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unified_run import LOSSES, TASKS, FixedData, assert_frozen_and_trained, losses_of, rows_of

from hydra_hf.cli import main as hydra
from hydra_hf.data.sources import Source, Sources
from hydra_hf.training.adapters import UnifiedObjective, length_of_prompts, train_unified


EXAMPLE = Path(__file__).parents[3] / "examples" / "other_unified_model.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("other_unified_model", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe(example, tmp_path_factory):
    recipe = example.create_recipe(tmp_path_factory.mktemp("init"), num_steps=30)
    data = {"data": FixedData(), "held_out": FixedData(is_held_out=True), "num_held_out": 2, "tasks": TASKS}
    return replace(recipe, stages=(replace(recipe.stages[0], **data),))


def test_the_example_is_trained_by_the_contract_alone(example, recipe, tmp_path):
    final = train_unified(recipe, tmp_path)
    before, after = (example.PatchPainter.from_pretrained(folder) for folder in (recipe.init, final))
    first, last = losses_of(before, recipe), losses_of(after, recipe)
    for name in LOSSES:
        assert last[name] < 0.9 * first[name], (name, first[name], last[name])
    assert_frozen_and_trained(before, after)
    (measured,) = rows_of(tmp_path / "unimrg", key="held_out/depth/image")
    assert {f"held_out/{name}" for name in LOSSES} <= set(measured)


@pytest.mark.parametrize("where", ["data", "held_out"])
def test_latents_that_hydra_keeps_are_refused_for_another_model(recipe, tmp_path, monkeypatch, where):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "images.jsonl").write_text('{"image": "0.png"}\n')
    kept = Sources((Source(task="depth", path=f"{tmp_path}/images.jsonl", latents="latents/depth"),))
    reading = replace(recipe, stages=(replace(recipe.stages[0], **{where: kept}),))
    message = "latents=latents/depth, which are HYDRA's, for a PatchPainter: leave latents=... out"
    with pytest.raises(ValueError, match=message):
        train_unified(reading, tmp_path / "run")


def test_a_bundle_is_counted_by_answers_and_by_images(recipe):
    stage = recipe.stages[0]
    bundle = stage.data.bundles(stage, recipe.processor, 0, max_length=256)[0]
    objective = UnifiedObjective(stage, seed=0)
    counts = {task: objective.count_targets(None, bundle[task]) for task in stage.tasks}
    assert counts["depth"] == {"language": 0, "image": 2}
    assert counts["understand"]["image"] == 0
    assert counts["understand"]["language"] == int((bundle["understand"]["labels"][:, 1:] != -100).sum()) > 2
    assert objective.count_targets(None, {**bundle["depth"], "num_samples": 0}) == {"language": 0, "image": 0}


def test_what_is_painted_is_not_in_the_prompt(recipe):
    stage = recipe.stages[0]
    bundle = stage.data.bundles(stage, recipe.processor, 0, max_length=256)[0]
    inputs = UnifiedObjective(stage, seed=0).prepare(None, bundle, "depth")
    batch, length = bundle["depth"], inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"], batch["input_ids"][:, :length])
    assert (batch["mm_token_type_ids"][:, length : length + recipe.processor.num_image_tokens] == 1).all()
    assert (
        (inputs["input_ids"] == recipe.processor.image_token_id).sum(dim=1) == recipe.processor.num_image_tokens
    ).all()
    assert not torch.equal(inputs["pixel_values"], inputs["target_pixel_values"])


def test_a_rows_noise_does_not_depend_on_its_process(recipe):
    stage = recipe.stages[0]
    objective = UnifiedObjective(stage, seed=0)

    def noise(rows: list[int], task: str = "depth", step: int = 3) -> list[float]:
        generators = objective.generators({"rows": {task: rows}, "step": step}, task)
        return [torch.rand((), generator=generator).item() for generator in generators]

    assert noise([0, 1, 2]) == [*noise([0]), *noise([1, 2])]
    different = [*noise([0, 1]), *noise([0], task="segment"), *noise([0], step=4)]
    assert len(set(different)) == 4


def test_an_image_to_paint_is_one_and_the_last():
    is_image = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()
    assert length_of_prompts(is_image, torch.tensor([False, True, False, True])) == 4
    with pytest.raises(ValueError, match="3 images to generate in 2 samples"):
        length_of_prompts(is_image, torch.tensor([True, True, False, True]))
    is_image[1] = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    with pytest.raises(ValueError, match=r"after \[3, 4\] tokens"):
        length_of_prompts(is_image, torch.tensor([False, True, False, True]))


def test_the_command_line_asks_for_the_model(capsys):
    assert hydra(["train", "unimrg.janus"]) == 2
    assert "needs --model: the model to be trained, a folder or Hub id" in capsys.readouterr().err
