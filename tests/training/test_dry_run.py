import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vision_tower_run
from torch.profiler import ProfilerActivity, profile

from hydra_hf.cli import main
from hydra_hf.data.images import HeldOut
from hydra_hf.modeling import HydraConfig, HydraForConditionalGeneration
from hydra_hf.toy.batches import ToyBatches, ToyBundles, ToyData, ToyHeldOut
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.bundle_trainer import BundleTrainer
from hydra_hf.training.dry_run import dry_run, report_stage, report_tower_stage
from hydra_hf.training.hydra_trainer import create_bundles, create_model
from hydra_hf.training.image_trainer import TokenizerTrainer
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.recipe import HydraRecipe, HydraStage, Recipe, TokenizerLossWeights
from hydra_hf.training.recipes import hydra, tiny
from hydra_hf.training.vision_tower_trainer import create_stage_model
from toy_models import toy_config, toy_processor


HEADS = {"vision_head": 1e-3, "model.vision_tower.sem_vit": 1e-3, "model.multi_modal_projector": 1e-3}
STAGE = HydraStage(
    name="stage1", num_steps=7, learning_rates=HEADS, tasks={"understand": 2, "generate": 40}, data=ToyData()
)
EVERYTHING = replace(STAGE, name="stage2", learning_rates={**HEADS, "model.language_model": 1e-3})
RECIPE = HydraRecipe(
    name="test", config=toy_config(), stages=(STAGE, EVERYTHING), tokenizer=None, processor=toy_processor()
)


WIDE = toy_config().to_dict()
WIDE["text_config"] |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "layer_types": None}
WIDE["vision_head_config"] |= {"hidden_size": 64, "intermediate_size": 128}


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


def test_prices_as_many_processes_as_are_asked_for():
    alone, shared = (dry_run(RECIPE, "stage2", num_processes)[0] for num_processes in (1, 2))
    assert "sharded" not in str(alone)
    assert "2 processes" in str(shared)
    assert "sharded" in str(shared)
    assert shared.flops == alone.flops
    assert shared.memory["buckets"] == shared.memory["gradients"]
    assert shared.memory["activations"] < 0.6 * alone.memory["activations"]
    kept = sum(shared.memory[name] for name in ("weights", "gradients", "optimizer", "average"))
    assert shared.sharded_memory == kept / 2 + shared.memory["activations"]
    with pytest.raises(ValueError, match="num_processes=0"):
        dry_run(RECIPE, num_processes=0)


def test_a_number_of_processes_without_a_dry_run_is_refused(tmp_path, capsys):
    assert main(["train", "tiny.hydra", "--num_processes", "2", "--out", str(tmp_path)]) == 2
    assert "--num_processes goes with --dry_run" in capsys.readouterr().err


def test_memory_is_that_of_adamw_over_fp32_weights(reports):
    weights, trained = map(sum, zip(*reports[1].parameters.values()))
    memory = dict(reports[1].memory)
    assert memory.pop("activations") > 0
    assert memory == {
        "weights": 4 * weights,
        "gradients": 4 * trained,
        "buckets": 0,
        "optimizer": 8 * trained,
        "average": 4 * weights,
    }


def test_muon_remembers_less_than_adamw():
    assert (
        report_stage(RECIPE, replace(STAGE, muon_scale=3.0)).memory["optimizer"]
        < (report_stage(RECIPE, STAGE).memory["optimizer"])
    )


def flops_of(recipe: HydraRecipe, task: str, rates: dict[str, float]) -> float:
    """Of one sample of nominal length."""
    return report_stage(recipe, replace(STAGE, data=None, tasks={task: 1}, learning_rates=rates)).flops


def test_operations_of_the_language_model_are_two_for_each_weight_and_token():
    """With all else negligible: a wide language model, no attention to speak of, forward, and twice that backward."""
    config = toy_config()
    config.text_config.intermediate_size = 20_000
    recipe = replace(RECIPE, config=config)
    layers = HydraForConditionalGeneration(config).model.language_model.layers
    weights = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    flops = flops_of(recipe, "text", EVERYTHING.learning_rates)
    assert flops == pytest.approx(3 * 2 * weights * 77, rel=0.02)


def test_a_frozen_module_behind_trained_ones_costs_two_forwards_and_before_them_one():
    rates = ({"vision_head": 1e-3}, HEADS, EVERYTHING.learning_rates)
    nothing, sem_vit, everything = (flops_of(RECIPE, "generate", named) for named in rates)
    assert nothing < sem_vit < everything


def test_gradient_checkpointing_costs_operations_and_saves_memory():
    recipe = replace(RECIPE, config=HydraConfig.from_dict(WIDE))
    plain, checkpointed = (
        report_stage(replace(recipe, gradient_checkpointing=on), EVERYTHING) for on in (False, True)
    )
    assert checkpointed.flops > plain.flops
    assert 0 < checkpointed.memory["activations"] < 0.7 * plain.memory["activations"]


def test_micro_steps_divide_the_activations():
    whole, parts = (report_stage(replace(RECIPE, micro_batch_size=size), STAGE) for size in (None, 11))
    assert (whole.accumulation, parts.accumulation) == (1, 4)
    assert parts.memory["activations"] == pytest.approx(whole.memory["activations"] / 4, rel=0.3)
    assert parts.flops == whole.flops


def test_a_budget_of_tokens_makes_micro_steps_of_about_as_many():
    whole = report_stage(RECIPE, STAGE)
    num_tokens = sum(task.num_samples * task.length[1] for task in whole.tasks.values())
    packed = report_stage(replace(RECIPE, max_length=100, micro_batch_tokens=round(num_tokens / 3.5)), STAGE)
    assert packed.accumulation == 4
    assert packed.memory["activations"] == pytest.approx(whole.memory["activations"] / 4, rel=0.3)


def test_adapters_are_counted_and_their_base_is_frozen():
    pytest.importorskip("peft")
    full, adapted = (report_stage(RECIPE, replace(EVERYTHING, lora_rank=rank)) for rank in (0, 2))
    total, trained = adapted.parameters["model.language_model"]
    assert total == full.parameters["model.language_model"][0] + trained
    assert 0 < trained < full.parameters["model.language_model"][1] / 2
    assert adapted.parameters["vision_head"] == full.parameters["vision_head"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_command_prints_the_stage_and_trains_nothing(capsys, tmp_path):
    arguments = ["train", "hydra.hydra_1_5b", "--stage", "stage3", "--micro_batch_size", "8", "--dry_run"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stage3: 20,000 steps, 20,400,000 samples; 1 processes x 136 micro steps")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--max_length", "64"), ("--num_workers", "2")])
def test_options_of_hydra_are_refused_for_a_tokenizer(capsys, tmp_path, option):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "tiny.tokenizer", *option, "--out", str(tmp_path / "run")])
    assert f"unexpected '{option[0]}'" in capsys.readouterr().err


# Vision towers


def test_the_command_reports_every_stage_of_a_tokenizer(capsys, tmp_path):
    assert main(["train", "tiny.tokenizer", "--dry_run", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("foundation: 3,000 steps, 96,000 samples; 1 processes x 1 micro steps")
    assert f"\ndecoder: {tiny.tokenizer().stages[-1].num_steps:,} steps" in out
    assert not (tmp_path / "run").exists()


def tower_report(**changes):
    recipe = Recipe(name="test", config=vision_tower_run.CONFIG, stages=())
    return report_tower_stage(recipe, vision_tower_run.make_stage(Path("judges"), **changes))


def test_a_tower_counts_its_judges_and_what_no_loss_reaches_as_frozen():
    whole, plain = tower_report(), tower_report(loss_weights=TokenizerLossWeights())
    assert plain.memory["judges"] == 0
    assert whole.memory["judges"] > 0
    assert plain.parameters["model.sem_vit"][1] == 0
    assert whole.parameters["model.sem_vit"][1] == whole.parameters["model.sem_vit"][0]


# Against what a step takes. Measured: the most bytes that torch's allocator, asked by its profiler, has given out at once
# while a trainer is made and makes two steps, and the model from before.


def measured_bytes(model: torch.nn.Module, train) -> int:
    gc.collect()  # what an earlier profile saw made and this one saw freed would count as negative
    before = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    given, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        given += event.nbytes()
        most = max(most, given)
    del kept
    return before + most


@pytest.mark.parametrize(
    ("checkpointing", "tolerance"), [(False, 0.15), (True, 0.2)]
)  # it says a sixth too much with it
def test_the_memory_of_hydra_is_that_of_a_real_step(tmp_path, checkpointing, tolerance):
    stage = replace(EVERYTHING, num_steps=2, tasks={"understand": 8, "generate": 16})
    recipe = replace(
        RECIPE,
        config=HydraConfig.from_dict(WIDE),
        stages=(stage,),
        gradient_checkpointing=checkpointing,
        save_every=10,
    )
    model = create_model(recipe)

    def train() -> BundleTrainer:
        bundles = create_bundles(recipe, stage, 0)
        trainer = BundleTrainer(model, HydraObjective(stage, 0), stage, bundles, tmp_path, recipe=recipe, seed=0)
        trainer.train()
        return trainer

    expected = report_stage(recipe, stage).memory
    assert sum(expected.values()) == pytest.approx(measured_bytes(model, train), rel=tolerance), expected


def test_the_memory_of_a_tower_is_that_of_a_real_step(tmp_path):
    vision_tower_run.write_judges(tmp_path)
    stage = vision_tower_run.make_stage(tmp_path, batch_size=16, mixed_precision="bf16", discriminator_start=0)
    recipe = Recipe(name="test", config=vision_tower_run.CONFIG, stages=(stage,))
    model = create_stage_model(recipe, stage, None)

    def train() -> TokenizerTrainer:
        world = ToyWorld(1)
        trainer = TokenizerTrainer(
            model,
            stage,
            ToyBatches(world, stage.batch_size, 1),
            HeldOut(ToyHeldOut(world, stage.num_held_out, 1)),
            tmp_path,
        )
        for _ in range(2):
            trainer.train_step()
            trainer.step += 1
        return trainer

    expected = report_tower_stage(recipe, stage).memory
    assert sum(expected.values()) == pytest.approx(measured_bytes(model, train), rel=0.15), expected
