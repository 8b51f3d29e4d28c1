"""`examples/few_step.py`: a student's step is the teacher's several guided ones, and the run resumes."""

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from hydra_hf.modeling.flow import inference_sigmas
from hydra_hf.modeling.grid import image_grids, tokens_to_latents
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.batches import ToyData
from hydra_hf.training.hydra_trainer import create_bundles
from toy_models import toy_pipeline


SCALE = 3.0


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "few_step.py"
    spec = spec_from_file_location("few_step", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    toy_pipeline().save_pretrained(path)
    return path


def options_of(example, folder: Path, out: Path, *others: str):
    given = ["--model", str(folder), "--out", str(out), "--num_updates", "3", "--batch_size", "4", "--device", "cpu"]
    scale = ["--guidance_scale", str(SCALE), "--prompts_per_category", "1"]
    return example.create_parser().parse_args([*given, *scale, *others])


@pytest.fixture
def stage(example, folder, tmp_path):
    recipe = example.create_recipe(options_of(example, folder, tmp_path))
    return recipe, recipe.stages[0]


def prepared(example, recipe, stage, level: int):
    """The batch of a step in which every image is at one of the student's noise levels, and the objective."""
    objective = example.DistillationObjective(stage, seed=0)
    sigmas = inference_sigmas(stage.student_steps, 3.0)  # the least shift
    objective.sample_levels = lambda model, grids, task, generator: sigmas[level].repeat(len(grids))
    bundle = create_bundles(recipe, stage, seed=0)[0]
    return objective, objective.prepare(objective.teacher, bundle, "generate")


@pytest.mark.parametrize("level", range(4))
def test_a_step_of_the_student_is_several_guided_steps_of_the_teacher(example, stage, folder, level):
    recipe, stage = stage
    objective, batch = prepared(example, recipe, stage, level)
    sigmas = [*inference_sigmas(stage.student_steps, 3.0).tolist(), 0.0]
    reached = batch["latents"] - (sigmas[level] - sigmas[level + 1]) * batch["velocity_target"]

    pipeline = HydraPipeline.from_pretrained(folder)
    grids = image_grids(batch["image_grid_thw"])
    prompts = [text_of(row, recipe.processor) for row in batch["input_ids"]]
    pipeline._guidance_scale = SCALE
    prefixes = [pipeline.prepare_prefix(texts, grids[0]) for texts in ([""] * len(prompts), prompts)]
    levels = pipeline.prepare_sigmas(stage.student_steps * stage.teacher_steps, grids[0])
    latents = tokens_to_latents(batch["latents"].unflatten(0, (len(grids), -1)), grids[0])
    first = level * stage.teacher_steps
    pipeline.scheduler.set_begin_index(first)
    for sigma in levels[first : first + stage.teacher_steps]:
        branches = pipeline.get_branches(prefixes, is_guided=True)
        latents = pipeline.denoise_step(latents, sigma, torch.tensor(1000 * sigma), branches)
    reached = tokens_to_latents(reached.unflatten(0, (len(grids), -1)), grids[0])
    torch.testing.assert_close(reached, latents, atol=1e-4, rtol=1e-4)


def text_of(input_ids, processor) -> str:
    """The user's words in a chat."""
    text = processor.tokenizer.decode(input_ids)
    return text.split("user\n")[1].split("<|im_end|>")[0].strip()


def test_images_are_at_the_levels_where_the_student_evaluates(example, stage):
    recipe, stage = stage
    bundle = create_bundles(recipe, replace(stage, tasks={"generate": 32}), seed=0)[0]
    objective = example.DistillationObjective(stage, seed=0)
    sigma = objective.prepare(objective.teacher, bundle, "generate")["sigma"]
    expected = inference_sigmas(stage.student_steps, 3.0)
    assert {round(value, 5) for value in sigma.tolist()} == {round(value, 5) for value in expected.tolist()}


def test_only_the_vision_head_is_trained_and_a_killed_run_resumes(example, folder, tmp_path):
    def recipe_of(out: Path, **kwargs):
        recipe = example.create_recipe(options_of(example, folder, out))
        held_out = replace(recipe.stages[0], held_out=None, data=ToyData(max_objects=1), decay_share=0.0, **kwargs)
        return replace(recipe, stages=(held_out,), save_every=1, sample_prompts=("a cat",))

    kind = example.DistilledHydra()
    whole = example.train_model(kind, recipe_of(tmp_path / "whole"), tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "distill" / "checkpoint-2"
    assert checkpoint.is_dir()
    for left in ("final", "distill/final", "distill/checkpoint-3"):  # as if the run had been killed in its last step
        remove(tmp_path / "whole" / left)
    first = states(whole_again := example.train_model(kind, recipe_of(tmp_path / "whole"), tmp_path / "whole"))
    assert whole_again == whole
    other = states(example.train_model(kind, recipe_of(tmp_path / "other"), tmp_path / "other"))
    start = states(folder)
    for name, value in other.items():
        torch.testing.assert_close(first[name], value)
        is_head = name.startswith("vision_head")
        assert is_head or torch.equal(value, start[name].to(torch.bfloat16).to(value.dtype)), name
    assert any(
        not torch.equal(other[name], start[name].to(torch.bfloat16).float()) for name in other if "vision_head" in name
    )
    pipeline = HydraPipeline.from_pretrained(whole)
    assert pipeline.config.default_num_inference_steps == 4
    assert pipeline.config.default_guidance_scale == 1.0


def remove(path: Path) -> None:
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()


def states(pipeline: Path) -> dict[str, torch.Tensor]:
    return HydraPipeline.from_pretrained(pipeline).model.state_dict()


def test_a_missing_gpu_is_one_clear_error(example, folder, tmp_path, monkeypatch):
    options = options_of(example, folder, tmp_path)
    options.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        example.main(options)


@pytest.mark.slow
def test_the_example_runs_and_writes_its_scores(example, folder, tmp_path):
    scores = example.main(options_of(example, folder, tmp_path, "--student_steps", "2"))
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert {"teacher", "teacher, 2 guided steps", "teacher, 2 steps", "student, 2 steps"} <= set(scores)
