from dataclasses import replace

import pytest
import torch

from hydra_hf.cli import main
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.training.dry_run import count_activations, count_flops, dry_run, meta_model, nominal_task, report_stage
from hydra_hf.training.recipe import HydraRecipe, HydraStage
from hydra_hf.training.recipes import hydra
from toy_models import toy_config, toy_processor


HEADS = {"vision_head": 1e-3, "model.vision_tower.sem_vit": 1e-3, "model.multi_modal_projector": 1e-3}
STAGE = HydraStage(
    name="stage1", num_steps=7, learning_rates=HEADS, tasks={"understand": 2, "generate": 40}, data=ToyData()
)
EVERYTHING = replace(STAGE, name="stage2", learning_rates={**HEADS, "model.language_model": 1e-3})
RECIPE = HydraRecipe(
    name="test", config=toy_config(), stages=(STAGE, EVERYTHING), tokenizer=None, processor=toy_processor()
)


@pytest.fixture(scope="module")
def reports():
    return dry_run(RECIPE)


def test_lengths_are_those_of_the_samples_that_a_step_reads(reports):
    few = replace(STAGE, tasks={"understand": 2, "generate": 16})
    bundle = ToyBundles(ToyData(), RECIPE.processor, few, seed=0)[0]
    for task, num_seen in few.tasks.items():
        lengths = bundle[task]["attention_mask"].sum(1).float()
        report = reports[0].tasks[task]
        assert report.num_seen == num_seen
        assert report.length == (lengths.min(), pytest.approx(lengths.mean().item()), lengths.max())
        assert report.image_tokens == 1 + 16
    assert reports[0].tasks["generate"].label_tokens == 1  # <|vision_start|>
    labels = (bundle["understand"]["labels"][:, 1:] != -100).sum().item()
    assert reports[0].tasks["understand"].label_tokens == labels / 2


def test_samples_and_steps_are_those_of_the_stage(reports):
    assert [report.num_steps for report in reports] == [7, 7]
    assert [report.num_samples for report in reports] == [7 * 42, 7 * 42]


def test_parameters_are_counted_once_and_trained_as_the_stage_says(reports):
    model = HydraForConditionalGeneration(RECIPE.config)
    for report, stage in zip(reports, RECIPE.stages):
        assert sum(total for total, _ in report.parameters.values()) == sum(p.numel() for p in model.parameters())
        names = {name for name, (_, trained) in report.parameters.items() if trained}
        assert names == set(stage.learning_rates)
        trained = sum(p.numel() for n, p in model.named_parameters() if n.startswith(tuple(stage.learning_rates)))
        assert sum(trained for _, trained in report.parameters.values()) == trained


def test_memory_is_that_of_adamw_over_fp32_weights(reports):
    weights, trained = map(sum, zip(*reports[1].parameters.values()))
    memory = dict(reports[1].memory)
    assert memory.pop("activations") > 0
    assert memory == {
        "weights": 4 * weights,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "average": 4 * weights,
    }


def test_muon_remembers_less_than_adamw():
    assert (
        report_stage(RECIPE, replace(STAGE, muon_scale=3.0)).memory["optimizer"]
        < (report_stage(RECIPE, STAGE).memory["optimizer"])
    )


def test_operations_of_the_language_model_are_two_for_each_weight_and_token():
    """With all else negligible: a wide language model, no attention to speak of, forward, and twice that backward."""
    config = toy_config()
    config.text_config.intermediate_size = 20_000
    recipe = replace(RECIPE, config=config)
    model = meta_model(recipe, EVERYTHING)
    task = nominal_task("text", 1, config)
    layers = model.model.language_model.layers
    weights = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    weights += model.lm_head.weight.numel()
    assert count_flops(model, recipe, task) == pytest.approx(3 * 2 * weights * 77, rel=0.02)


def test_a_frozen_module_behind_trained_ones_costs_two_forwards_and_before_them_one():
    task = nominal_task("generate", 1, RECIPE.config)
    costs = {}
    for name, rates in {"nothing": {"vision_head": 1e-3}, "sem": HEADS, "all": EVERYTHING.learning_rates}.items():
        stage = replace(STAGE, learning_rates=rates)
        costs[name] = count_flops(meta_model(RECIPE, stage), RECIPE, task)
    assert costs["nothing"] < costs["sem"] < costs["all"]


def test_gradient_checkpointing_costs_operations_and_saves_memory():
    recipe = replace(RECIPE, gradient_checkpointing=True)
    task = nominal_task("generate", 1, RECIPE.config)
    plain, checkpointed = meta_model(RECIPE, EVERYTHING), meta_model(recipe, EVERYTHING)
    assert count_flops(checkpointed, recipe, task) > count_flops(plain, RECIPE, task)
    assert 0 < count_activations(checkpointed, recipe, task) < 0.7 * count_activations(plain, RECIPE, task)


def test_micro_steps_divide_the_activations():
    whole, parts = (report_stage(replace(RECIPE, micro_batch_size=size), STAGE) for size in (None, 11))
    assert (whole.accumulation, parts.accumulation) == (1, 4)
    assert parts.memory["activations"] == pytest.approx(whole.memory["activations"] / 4, rel=0.15)
    assert parts.flops == whole.flops


def test_adapters_are_counted_and_their_base_is_frozen():
    pytest.importorskip("peft")
    full, adapted = (report_stage(RECIPE, replace(EVERYTHING, lora_rank=rank)) for rank in (0, 2))
    total, trained = adapted.parameters["model.language_model"]
    assert total == full.parameters["model.language_model"][0] + trained
    assert 0 < trained < full.parameters["model.language_model"][1] / 2
    assert adapted.parameters["vision_head"] == full.parameters["vision_head"]


def test_a_full_size_recipe_needs_neither_weights_nor_data():
    (report,) = dry_run(hydra.hydra_1_5b(), "stage1")
    assert report.num_samples == 150_000 * 1024
    assert {name: (task.num_seen, task.length[1]) for name, task in report.tasks.items()} == {
        "understand": (0, 77 + 1 + 1024),
        "generate": (0, 77 + 1 + 1024),
    }
    assert "nominal" in str(report)
    assert report.parameters["model.language_model"] == (1_543_714_304, 0)
    assert "lm_head" not in report.parameters  # it is the embedding
    # a frozen language model of 1.31e9 weights beside its embedding: twice the forward, once more for checkpointing
    assert report.flops > 1024 * 3 * 2 * 1.31e9 * 1102


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="test has no stage 'stage9'"):
        dry_run(RECIPE, "stage9")


def test_the_command_prints_the_stage_and_trains_nothing(capsys, tmp_path):
    arguments = ["train", "hydra.hydra_1_5b", "--stage", "stage3", "--micro_batch_size", "8", "--dry_run"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stage3: 20,000 steps, 20,400,000 samples; 1 processes x 136 micro steps")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--dry_run",), ("--max_length", "64"), ("--num_workers", "2")])
def test_options_of_hydra_are_refused_for_a_tokenizer(capsys, tmp_path, option):
    assert main(["train", "tiny.tokenizer", *option, "--out", str(tmp_path / "run")]) == 2
    assert f"The recipe tiny.tokenizer takes no {option[0]}" in capsys.readouterr().err
