import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils.logging import disable_propagation, enable_propagation

from hydra_hf.data.collate import collate
from hydra_hf.data.sample import Sample
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.training.bundle_trainer import BundleTrainer
from hydra_hf.training.checkpoints import last_whole_checkpoint, save_state
from hydra_hf.training.hydra_trainer import create_bundles, create_held_out, create_model, train_hydra
from hydra_hf.training.interruption import TrainingInterruptedError
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.processes import num_accumulation_steps
from hydra_hf.training.randomness import grids_per_sample, row_noise
from hydra_hf.training.recipe import HydraRecipe, HydraStage
from toy_models import toy_config, toy_language, toy_pipeline, toy_processor


TOWER = "model.vision_tower."
HEADS = {"vision_head": 1e-3, f"{TOWER}sem_vit": 1e-3, f"{TOWER}bottleneck.semantic_up_proj": 1e-3,
         "model.multi_modal_projector": 1e-3, "model.time_embedding": 1e-3}  # fmt: skip
STAGE1 = HydraStage(
    name="stage1",
    num_steps=5,
    learning_rates=HEADS,
    tasks={"understand": 2, "generate": 3},
    data=ToyData(),
    muon_scale=3.0,
    warmup_steps=2,
    mixed_precision="no",
)
STAGE2 = replace(STAGE1, name="stage2", num_steps=3, learning_rates={**HEADS, "model.language_model": 1e-3})


class KilledError(Exception):
    pass


class BundlesOfAKilledRun(ToyBundles):
    """The run ends before the step after its first checkpoint."""

    def __getitem__(self, index: int) -> dict:
        if index == 3 * self.accumulation:
            raise KilledError
        return super().__getitem__(index)


class BundlesOfAStoppedRun(ToyBundles):
    """The run is asked to stop in its third step, between two checkpoints."""

    def __getitem__(self, index: int) -> dict:
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> HydraRecipe:
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_pipeline().model.model.vision_tower.save_pretrained(folder)
    return HydraRecipe(
        name="test", config=toy_config(), stages=(STAGE1, STAGE2), log_every=1, save_every=2, sample_every=100,
        tokenizer=str(folder), processor=toy_processor(),
    )  # fmt: skip


@pytest.fixture
def make_trainer(recipe):
    def make(folder, stage=STAGE1, bundles=ToyBundles, accumulation=1, **changes) -> BundleTrainer:
        folder.mkdir(exist_ok=True)
        bundles = bundles(ToyData(), recipe.processor, stage, seed=0, accumulation=accumulation)
        return BundleTrainer(
            create_model(recipe), HydraObjective(stage, seed=0), stage, bundles, folder,
            recipe=replace(recipe, **changes), seed=0, accumulation=accumulation,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """An uninterrupted run of both stages: its folder, and that of the finished pipeline."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, train_hydra(recipe, folder)


def losses_of(folder) -> dict[int, dict]:
    """The named losses by step; what a resumed run does again counts."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        record["step"]: {
            name: record[name]
            for name in ("loss", "understand/language", "generate/flow", "grad_norm", "learning_rate")
        }
        for record in records
        if "loss" in record
    }


def trained(model: nn.Module, stage: HydraStage) -> set[str]:
    return {name for name, p in model.named_parameters() if name.startswith(tuple(stage.learning_rates)) and p.numel()}


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    others = dict(after.named_parameters())
    return {name for name, parameter in before.named_parameters() if not torch.equal(parameter, others[name])}


# Runs


@pytest.mark.smoke
def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(make_trainer, tmp_path):
    uninterrupted = make_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "killed", bundles=BundlesOfAKilledRun).train()
    checkpoint = last_whole_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-2")
    resumed = make_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=checkpoint)
    losses = losses_of(tmp_path / "killed")
    assert losses == losses_of(tmp_path / "uninterrupted")
    assert list(losses) == [1, 2, 3, 4, 5]
    torch.testing.assert_close(resumed.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.ema.state_dict(), uninterrupted.ema.state_dict(), rtol=0, atol=0)
    files = [tmp_path / run / "checkpoint-5" / "optimizer.safetensors" for run in ("killed", "uninterrupted")]
    torch.testing.assert_close(load_file(files[0]), load_file(files[1]), rtol=0, atol=0)


def test_a_stopped_run_saves_its_step_and_ends_as_an_uninterrupted_one(make_trainer, tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train_stage()
    with pytest.raises(TrainingInterruptedError, match="stage1 stopped at step 3 by SIGTERM"):
        make_trainer(tmp_path / "stopped", bundles=BundlesOfAStoppedRun).train_stage()
    assert last_whole_checkpoint(tmp_path / "stopped").endswith("checkpoint-3")
    resumed = make_trainer(tmp_path / "stopped")
    resumed.train_stage()
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    logs = [[{**json.loads(line), "epoch": 0} for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("stopped", "whole")]  # fmt: skip
    assert logs[0] == logs[1]


def test_rows_after_the_last_checkpoint_are_not_doubled(make_trainer, tmp_path):
    with pytest.raises(KilledError):
        make_trainer(tmp_path, bundles=BundlesOfAKilledRun).train_stage()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # as a run that is killed in step 4 leaves it
    make_trainer(tmp_path).train_stage()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_resume_warns_of_nothing(make_trainer, tmp_path, caplog):
    with pytest.raises(KilledError):
        make_trainer(tmp_path, bundles=BundlesOfAKilledRun).train_stage()
    trainer = make_trainer(tmp_path)
    assert trainer.model.config.text_config.tie_word_embeddings
    with caplog.at_level("WARNING"), transformers_logs_propagate():
        trainer.train_stage()
    assert "missing keys" not in caplog.text


@contextmanager
def transformers_logs_propagate():
    enable_propagation()
    yield
    disable_propagation()


def test_a_checkpoint_of_another_model_is_refused_in_a_sentence(make_trainer, recipe, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(KilledError):
        make_trainer(tmp_path, replace(STAGE1, lora_rank=2), bundles=BundlesOfAKilledRun).train_stage()
    with pytest.raises(ValueError, match=r"checkpoint-2 does not fit the model of stage1: "):
        make_trainer(tmp_path, replace(STAGE1, lora_rank=3)).train_stage()


def test_two_checkpoints_are_kept_and_strangers_left_alone(make_trainer, tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-2.zip").write_bytes(b"zip")
    make_trainer(tmp_path, save_every=1).train_stage()
    names = {"checkpoint-4", "checkpoint-5", "checkpoint-best", "checkpoint-2.zip"}
    assert {path.name for path in tmp_path.glob("checkpoint*")} == names


def test_a_checkpoint_that_finds_no_room_is_one_error_and_the_one_before_it_is_resumed(
    make_trainer, tmp_path, monkeypatch
):
    from hydra_hf.training import bundle_trainer

    def save_until_full(folder, name, state) -> None:
        if folder.name == "checkpoint-4" and name == "optimizer":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_state(folder, name, state)

    monkeypatch.setattr(bundle_trainer, "save_state", save_until_full)
    with pytest.raises(OSError, match=r"checkpoint-4 cannot be written: .*No space left on device"):
        make_trainer(tmp_path).train_stage()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]
    make_trainer(tmp_path).train_stage()
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-5")


def test_held_out_losses_are_those_of_fixed_rows_and_noise(recipe, make_trainer, tmp_path):
    stage = replace(STAGE1, held_out=ToyData(is_held_out=True), num_held_out=3, learning_rates={"vision_head": 1e-9})
    stage = replace(stage, ema_decay=0.0, muon_scale=0.0)
    folder = tmp_path / "run"
    train_hydra(replace(recipe, stages=(stage,), sample_every=2, micro_batch_size=4), folder)
    records = [json.loads(line) for line in (folder / "stage1" / "log.jsonl").read_text().splitlines()]
    measured = {record["step"]: record for record in records if "held_out/generate/flow" in record}
    assert list(measured) == [2, 4, 5]
    names = {"held_out/understand/language", "held_out/generate/language", "held_out/generate/flow"}
    assert all({name for name in record if name.startswith("held_out")} == names for record in measured.values())
    for name in names:  # weights that hardly move
        assert measured[2][name] == pytest.approx(measured[5][name], rel=1e-4)
    whole = make_trainer(tmp_path / "whole", stage)
    whole.held_out = create_held_out(recipe, stage)  # all rows in one micro step
    assert whole.measure_held_out() == pytest.approx({name: measured[2][name] for name in names}, rel=1e-3)
    trained = create_bundles(recipe, stage, seed=0)[0]
    assert not torch.equal(whole.held_out[0]["generate"]["pixel_values"], trained["generate"]["pixel_values"])


def test_the_saved_pipelines_have_the_recipes_defaults(recipe, finished):
    for folder in (finished[1], finished[0] / "stage1" / "final"):
        config = HydraPipeline.from_pretrained(folder).config
        assert config.default_num_inference_steps == recipe.num_inference_steps == 50
        assert config.default_guidance_scale == recipe.guidance_scale == 4.5


def test_the_finished_pipeline_is_stored_in_bf16_and_opens_in_fp32(finished):
    weights = load_file(finished[1] / "model" / "model.safetensors")
    dtypes = {value.dtype for name, value in weights.items() if "latents_" not in name}
    assert dtypes == {torch.bfloat16}
    assert weights["model.vision_tower.bottleneck.latents_std"].dtype == torch.float32
    assert json.loads((finished[1] / "model" / "config.json").read_text())["dtype"] == "float32"
    assert HydraPipeline.from_pretrained(finished[1]).model.dtype == torch.float32


def test_a_sample_longer_than_the_recipe_allows_is_refused(recipe):
    with pytest.raises(ValueError, match="max_length=513 must be 1 to 512"):
        replace(recipe, max_length=513)


def test_a_checkpoint_holds_no_pickle(finished):
    files = [path for path in (finished[0] / "stage1" / "checkpoint-5").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert {"ema.safetensors", "model.safetensors", "optimizer.safetensors"} <= {path.name for path in files}


def test_a_finished_run_trains_nothing_when_it_is_called_again(recipe, finished):
    def fail(message: str) -> None:
        raise AssertionError(message)

    weights = load_file(finished[1] / "model" / "model.safetensors")
    assert train_hydra(recipe, finished[0], on_stage=fail) == finished[1]
    torch.testing.assert_close(load_file(finished[1] / "model" / "model.safetensors"), weights, rtol=0, atol=0)


def test_stage_one_moves_the_heads_and_leaves_the_language_model(recipe, finished):
    before = create_model(recipe)
    after = HydraForConditionalGeneration.from_pretrained(finished[0] / "stage1" / "final" / "model")
    assert moved(before, after) == trained(before, STAGE1)
    assert not [name for name in trained(before, STAGE1) if "language_model" in name]


def test_stage_two_moves_the_language_model_and_leaves_what_makes_latents(finished):
    before, after = (
        HydraForConditionalGeneration.from_pretrained(finished[0] / stage / "final" / "model")
        for stage in ("stage1", "stage2")
    )
    names = moved(before, after)
    assert names == trained(before, STAGE2)
    assert "model.language_model.embed_tokens.weight" in names
    assert not [name for name in names if "gen_vit" in name or "pixel_decoder" in name or "down_proj.bias" in name]
    buffers = dict(after.named_buffers())
    torch.testing.assert_close(dict(before.named_buffers()), buffers, rtol=0, atol=0)


def test_the_finished_pipeline_opens_and_draws(finished):
    pipeline = HydraPipeline.from_pretrained(finished[1])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.model.dtype == torch.float32
    images = pipeline(["a cat", ""], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(64, 64)] * 2


def test_sample_grids_come_with_their_prompts(finished):
    assert [path.name for path in (finished[0] / "stage1").glob("samples*.png")] == ["samples-000005.png"]
    assert len((finished[0] / "stage1" / "samples.txt").read_text().splitlines()) == 24


# Bundles


def test_a_bundle_is_the_same_whenever_it_is_asked_for(recipe):
    bundles = ToyBundles(ToyData(), recipe.processor, STAGE1, seed=0)
    first, other, again = bundles[2], bundles[3], bundles[2]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["generate"]["pixel_values"], other["generate"]["pixel_values"])
    assert len(bundles) == STAGE1.num_steps
    assert [len(first[task]["image_grid_thw"]) for task in STAGE1.tasks] == [2, 3]
    assert first["rows"] == {"understand": [0, 1], "generate": [0, 1, 2]}


def test_bundles_of_all_processes_and_micro_steps_are_the_bundle_of_one(recipe):
    def bundles(**place) -> ToyBundles:
        return ToyBundles(ToyData(), recipe.processor, STAGE1, seed=0, **place)

    whole = bundles()[3]["generate"]["pixel_values"].unflatten(0, (3, -1))
    places = {}
    for process in range(2):
        for micro_step in range(2):
            part = bundles(process_index=process, num_processes=2, accumulation=2)[3 * 2 + micro_step]
            rows = part["rows"]["generate"]
            assert part["step"] == 3
            places[process, micro_step] = rows
            if part["generate"]["num_samples"]:
                assert torch.equal(part["generate"]["pixel_values"], whole[rows].flatten(0, 1))
            else:
                assert rows == [3]
    assert places == {(0, 0): [0], (0, 1): [2], (1, 0): [1], (1, 1): [3]}


def test_a_task_that_the_toy_world_does_not_have_is_refused(recipe):
    bundles = ToyBundles(ToyData(), recipe.processor, replace(STAGE1, tasks={"text": 1}), seed=0)
    with pytest.raises(ValueError, match="task='text' of stage 'stage1'"):
        bundles[0]


# One step


def edit_batch(recipe, num_samples: int = 1) -> dict:
    """Samples with a given image, some text of the assistant, and a generated image."""
    generator = hashed_generator(0, 0)
    images = toy_language().world.render(toy_language().world.sample_scenes(2 * num_samples, generator)).split(2)
    samples = [
        Sample(task="edit", messages=[
            {"role": "user", "content": [{"type": "image", "image": given}, {"type": "text", "text": "a cat"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a dog"}, {"type": "image", "image": made}]},
        ])
        for given, made in images
    ]  # fmt: skip
    return collate(samples, recipe.processor)


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_the_gradient_through_given_images_is_scaled(recipe, scale):
    def gradient(scale: float, task: str) -> torch.Tensor:
        model = toy_pipeline().model
        model.requires_grad_(True).zero_grad()
        objective = HydraObjective(replace(recipe.stages[0], condition_grad_scale=scale), seed=0)
        batch = edit_batch(recipe)
        if task == "understand":
            batch = {**batch, "is_generated": torch.zeros(2, dtype=torch.bool)}
        inputs = objective.prepare(model, bundle_of(**{task: batch}), task)
        sum(objective.losses_of(model, inputs, model(**inputs)).values()).backward()
        return model.model.vision_tower.sem_vit.layers[0].mlp.fc1.weight.grad

    torch.testing.assert_close(gradient(scale, "understand"), scale * gradient(1.0, "understand"))
    assert not torch.allclose(
        gradient(scale, "edit"), scale * gradient(1.0, "edit")
    )  # through what is generated, in full


def bundle_of(step: int = 0, **batches: dict) -> dict:
    """What the trainer takes: all rows of these batches, in one process."""
    for batch in batches.values():
        batch["num_samples"] = len(batch["input_ids"])
    rows = {task: list(range(batch["num_samples"])) for task, batch in batches.items()}
    return {**batches, "rows": rows, "step": step, "micro_step": 0, "skipped": {}}


def loss_of(trainer: BundleTrainer, bundle: dict) -> tuple:
    bundles, counts = trainer.get_batch_samples(iter([bundle]), 1, torch.device("cpu"))
    return trainer.compute_loss(trainer.model, bundles[0], return_outputs=True, num_items_in_batch=counts)


def test_noise_is_put_on_generated_images_only(make_trainer, recipe, tmp_path):
    trainer, batch = make_trainer(tmp_path), edit_batch(recipe, 2)
    clean = trainer.model.encode_images(batch["pixel_values"], batch["image_grid_thw"]).unflatten(0, (4, -1))
    prepared = trainer.objective.prepare(trainer.model, bundle_of(edit=batch), "edit")
    noisy = prepared["latents"].unflatten(0, (4, -1))
    given, generated = slice(0, None, 2), slice(1, None, 2)
    assert prepared["sigma"][given].tolist() == [0, 0]
    assert (prepared["sigma"][generated] > 0).all()
    assert torch.equal(noisy[given], clean[given])
    sigma = prepared["sigma"][generated][:, None, None]
    target = prepared["velocity_target"].unflatten(0, (2, -1))
    torch.testing.assert_close(noisy[generated], clean[generated] + sigma * target)
    assert trainer.objective.count_targets(trainer.model, batch) == {"language": 2 * 3, "flow": 2 * 16}
    assert "pixel_values" not in prepared
    assert "pixel_values" in batch  # the caller's bundle is as it was


def test_text_to_image_has_the_start_of_each_image_as_its_only_label(make_trainer, recipe, tmp_path):
    batch = collate(toy_language().generate_samples(2, hashed_generator(0, 0)), recipe.processor)
    trainer, batch["num_samples"] = make_trainer(tmp_path), 2
    start = recipe.config.vision_start_token_id
    assert batch["labels"][batch["labels"] >= 0].tolist() == [start, start]
    assert trainer.objective.count_targets(trainer.model, batch) == {"language": 2, "flow": 2 * 16}


def test_a_batch_without_labels_has_no_logits_of_the_prompt(make_trainer, recipe, tmp_path):
    batch = collate(toy_language().generate_samples(2, hashed_generator(0, 0)), recipe.processor)
    batch["labels"].fill_(-100)
    trainer = make_trainer(tmp_path)
    prepared = trainer.objective.prepare(trainer.model, bundle_of(generate=batch), "generate")
    assert "labels" not in prepared
    assert prepared["logits_to_keep"] == 1


def test_images_of_several_sizes_train_as_each_alone(make_trainer, recipe, tmp_path):
    sizes, trainer = [(16, 48), (32, 32), (16, 48)], make_trainer(tmp_path)
    samples = [
        Sample(task="generate", messages=[
            {"role": "user", "content": [{"type": "text", "text": "a cat"}]},
            {"role": "assistant", "content": [{"type": "image", "image": torch.rand(3, *size, generator=hashed_generator(0, index))}]},
        ])
        for index, size in enumerate(sizes)
    ]  # fmt: skip
    together = bundle_of(generate=collate(samples, recipe.processor))
    prepared, tokens = trainer.objective.prepare(trainer.model, together, "generate"), [3, 4, 3]
    flow, totals = trainer.model(**prepared).flow_loss, 0
    for row, count in enumerate(tokens):
        alone = bundle_of(generate=collate(samples[row : row + 1], recipe.processor)) | {"rows": {"generate": [row]}}
        totals += trainer.model(**trainer.objective.prepare(trainer.model, alone, "generate")).flow_loss * count
    torch.testing.assert_close(flow, totals / sum(tokens))
    assert trainer.objective.count_targets(trainer.model, together["generate"])["flow"] == sum(tokens)


def test_understanding_has_neither_noise_nor_a_velocity(make_trainer, recipe, tmp_path):
    batch = collate(toy_language().understand_samples(2, hashed_generator(0, 0), 3), recipe.processor)
    trainer, bundle = make_trainer(tmp_path), bundle_of(understand=batch)
    prepared = trainer.objective.prepare(trainer.model, bundle, "understand")
    assert prepared["sigma"].tolist() == [0, 0]
    assert {"is_generated", "velocity_target"}.isdisjoint(prepared)
    assert trainer.objective.count_targets(trainer.model, batch) == {
        "language": (prepared["labels"] >= 0).sum(),
        "flow": 0,
    }


@torch.no_grad()
def test_a_language_loss_is_the_mean_over_the_tokens_of_its_task(make_trainer, recipe, tmp_path):
    trainer = make_trainer(tmp_path, replace(STAGE1, task_weights={"understand": 0.25}))
    short, long = (
        collate(toy_language().understand_samples(count, hashed_generator(0, count), questions), recipe.processor)
        for count, questions in ((1, 1), (3, 4))
    )
    loss, outputs = loss_of(trainer, bundle_of(understand=short, generate=long))
    expected = {
        task: nn.functional.cross_entropy(outputs[task].logits, batch["labels"][:, 1:][batch["labels"][:, 1:] != -100])
        for task, batch in {"understand": short, "generate": long}.items()
    }
    torch.testing.assert_close(loss, 0.25 * expected["understand"] + expected["generate"])
    assert trainer.losses.collect(trainer.accelerator) == {
        f"{task}/language": pytest.approx(value.item(), abs=1e-5) for task, value in expected.items()
    }


@torch.no_grad()
def test_a_flow_loss_is_the_mean_over_the_image_tokens_of_its_task(make_trainer, recipe, tmp_path):
    weights = {"loss_weights": replace(STAGE1.loss_weights, language=0.0), "task_weights": {"generate": 3.0}}
    trainer = make_trainer(tmp_path, replace(STAGE1, **weights))
    for parameter in trainer.model.vision_head.out_proj.parameters():
        parameter.fill_(0.05)
    batches = {"understand": edit_batch(recipe, 1), "generate": edit_batch(recipe, 3)}
    bundle = bundle_of(5, **batches)
    loss, outputs = loss_of(trainer, bundle)
    expected = {}
    for task in batches:
        target = trainer.objective.prepare(trainer.model, bundle, task)["velocity_target"]
        expected[task] = ((outputs[task].velocity - target) ** 2).mean()
    torch.testing.assert_close(loss, expected["understand"] + 3 * expected["generate"])


def test_one_task_a_head_has_the_papers_sum():
    assert [STAGE1.loss_weight_of("understand", "language"), STAGE1.loss_weight_of("generate", "flow")] == [1, 1]


@pytest.mark.parametrize("weights", [{"edit": 1.0}, {"generate": -1.0}, {"generate": float("nan")}])
def test_a_weight_of_a_task_that_is_not_trained_or_below_zero_is_refused(weights):
    with pytest.raises(ValueError, match="stage1: task_weights="):
        replace(STAGE1, task_weights=weights)


@torch.no_grad()
def test_a_task_may_have_noise_levels_of_its_own(make_trainer, recipe, tmp_path):
    bundle = bundle_of(generate=edit_batch(recipe, 4))
    plain, shifted = (
        trainer.objective.prepare(trainer.model, bundle, "generate")["sigma"]
        for trainer in (
            make_trainer(tmp_path / "plain"),
            make_trainer(tmp_path / "shifted", replace(STAGE1, sigma_shifts={"generate": 30.0})),
        )
    )
    is_generated = plain > 0
    assert torch.equal(shifted > 0, is_generated)
    odds = [sigma[is_generated] / (1 - sigma[is_generated]) for sigma in (plain, shifted)]
    ratio = odds[1] / odds[0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)  # 30 / the model's own shift
    assert ratio[0] > 5


@pytest.mark.parametrize("shifts", [{"edit": 2.0}, {"generate": 0.0}, {"generate": float("nan")}])
def test_a_shift_of_a_task_that_is_not_trained_or_not_positive_is_refused(shifts):
    with pytest.raises(ValueError, match="stage1: sigma_shifts="):
        replace(STAGE1, sigma_shifts=shifts)


@torch.no_grad()
def test_a_blank_batch_runs_its_forward_and_counts_nothing(make_trainer, recipe, tmp_path):
    trainer, understand = (
        make_trainer(tmp_path),
        collate(toy_language().understand_samples(2, hashed_generator(0, 0), 3), recipe.processor),
    )
    with_blank = bundle_of(understand=understand, generate=edit_batch(recipe, 1))
    with_blank["generate"]["num_samples"] = 0
    loss, outputs = loss_of(trainer, with_blank)
    assert outputs["generate"].flow_loss > 0
    torch.testing.assert_close(loss, outputs["understand"].language_loss)
    assert list(trainer.losses.collect(trainer.accelerator)) == ["understand/language"]


def test_skipped_records_are_in_the_log(make_trainer, recipe, tmp_path):
    trainer = make_trainer(tmp_path)
    for skipped in ({"understand": 2, "generate": 1}, {"understand": 0, "generate": 4}):
        bundle = bundle_of(understand=edit_batch(recipe), generate=edit_batch(recipe))
        loss_of(trainer, {**bundle, "skipped": skipped})
    assert trainer.losses.collect(trainer.accelerator)["skipped"] == 7


# Micro steps


@pytest.mark.smoke
def test_a_run_with_accumulation_ends_as_one_without(make_trainer, tmp_path):
    # Muon makes a whole step of the smallest difference, and Adam of every rounding error
    stage = replace(STAGE1, muon_scale=0.0, learning_rates=dict.fromkeys(HEADS, 3e-5))
    runs = {}
    for accumulation in (1, 2):
        folder = tmp_path / str(accumulation)
        runs[accumulation] = make_trainer(folder, stage, accumulation=accumulation)
        runs[accumulation].train()
    torch.testing.assert_close(runs[1].model.state_dict(), runs[2].model.state_dict(), rtol=1e-5, atol=1e-5)
    for one, two in zip(losses_of(tmp_path / "1").values(), losses_of(tmp_path / "2").values(), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_a_run_with_accumulation_resumes_at_its_step(make_trainer, tmp_path):
    uninterrupted = make_trainer(tmp_path / "uninterrupted", accumulation=2)
    uninterrupted.train()
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "killed", accumulation=2, bundles=BundlesOfAKilledRun).train()
    resumed = make_trainer(tmp_path / "killed", accumulation=2)
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path / "killed"))
    torch.testing.assert_close(resumed.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0)


def test_gradient_checkpointing_changes_the_memory_and_not_the_weights(make_trainer, tmp_path):
    stage = replace(STAGE1, num_steps=2)
    plain, checkpointed = (
        make_trainer(tmp_path / "plain", stage),
        make_trainer(tmp_path / "checkpointed", stage, gradient_checkpointing=True),
    )
    plain.train()
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    torch.testing.assert_close(checkpointed.model.state_dict(), plain.model.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_stage_without_average_gives_its_weights(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, replace(STAGE1, num_steps=2, ema_decay=0.0))
    trainer.train()
    assert trainer.averaged_model is trainer.model
    assert not list((tmp_path / "checkpoint-2").glob("ema*"))


@pytest.mark.parametrize(
    "num_processes, micro_batch_size, expected", [(1, None, 1), (64, None, 1), (64, 16, 1), (64, 8, 2), (64, 2, 12), (2, 512, 1)]
)  # fmt: skip
def test_micro_steps_are_as_few_as_the_memory_allows(num_processes, micro_batch_size, expected):
    tasks = {"understand": 256, "generate": 768}
    assert num_accumulation_steps(tasks, num_processes, micro_batch_size) == expected


def test_a_micro_batch_without_room_for_every_task_is_refused():
    with pytest.raises(ValueError, match="micro_batch_size=1 must be at least 2"):
        num_accumulation_steps({"understand": 256, "generate": 768}, 8, 1)


# Noise


GRID = (1, 2, 3)


def draw(grids: list, generator: torch.Generator) -> tuple:
    return torch.rand(len(grids), generator=generator), torch.randn(6 * len(grids), 2, generator=generator)


def test_the_noise_of_a_row_is_the_same_whoever_else_is_in_the_batch():
    together = row_noise(7, "generate", [0, 1, 2, 3], [[GRID]] * 4, draw, seed=5)
    apart = row_noise(7, "generate", [3, 1], [[GRID]] * 2, draw, seed=5)
    for whole, part in zip(together, apart):
        assert torch.equal(whole.unflatten(0, (4, -1))[[3, 1]], part.unflatten(0, (2, -1)))


def test_the_noise_of_a_row_depends_on_seed_step_task_and_row():
    places = [(0, 0, "generate", 0), (1, 0, "generate", 0), (0, 1, "generate", 0), (0, 0, "understand", 0),
              (0, 0, "generate", 1)]  # fmt: skip
    drawn = {
        row_noise(step, task, [row], [[GRID]], draw, seed=seed)[1][0, 0].item() for seed, step, task, row in places
    }
    assert len(drawn) == len(places)


def test_every_image_of_a_row_has_its_noise():
    sigma, noise = row_noise(0, "edit", [4, 7, 9], [[GRID, GRID], [], [GRID]], draw, seed=0)
    assert (len(sigma), len(noise)) == (3, 3 * 6)
    assert torch.equal(noise[2 * 6 :], row_noise(0, "edit", [9], [[GRID]], draw, seed=0)[1])


def test_images_of_a_row_are_found_by_their_runs(recipe):
    ids = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    assert grids_per_sample({"mm_token_type_ids": ids}, ["a", "b", "c"]) == [["a", "b"], [], ["c"]]
    assert grids_per_sample(edit_batch(recipe, 3), [*"abcdef"]) == [
        ["a", "b"],
        ["c", "d"],
        ["e", "f"],
    ]


# Where a stage starts


def test_one_stage_alone_goes_on_from_the_one_before_it(recipe, finished, tmp_path):
    first = train_hydra(recipe, tmp_path, only="stage1")
    assert first == tmp_path / "stage1" / "final"
    assert not (tmp_path / "stage2").exists()
    assert not (tmp_path / "final").exists()
    second = train_hydra(recipe, tmp_path, only="stage2")
    weights = [load_file(run / "model" / "model.safetensors") for run in (second, finished[0] / "stage2" / "final")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    weights = [load_file(run / "final" / "model" / "model.safetensors") for run in (tmp_path, finished[0])]
    torch.testing.assert_close(*weights, rtol=0, atol=0)  # all stages are done


def test_a_recipe_is_not_changed_by_a_run(recipe):
    before = recipe.config.to_dict()
    create_model(recipe).config.vocab_size = 1
    assert recipe.config.to_dict() == before


def test_the_first_stage_starts_from_init_with_the_trained_tokenizer(recipe, finished):
    init = finished[0] / "stage2" / "final"
    weights = HydraForConditionalGeneration.from_pretrained(init / "model").state_dict()
    torch.testing.assert_close(
        create_model(replace(recipe, init=str(init), tokenizer=None)).state_dict(), weights, rtol=0, atol=0
    )
    model = create_model(replace(recipe, init=str(finished[1])))  # in bf16, but for the tokenizer
    assert model.dtype == torch.float32
    tower = create_model(recipe).model.vision_tower.state_dict()
    torch.testing.assert_close(model.model.vision_tower.state_dict(), tower, rtol=0, atol=0)
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_a_tokenizer_of_another_width_is_refused(recipe, tmp_path, make_tiny_model):
    make_tiny_model().model.vision_tower.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="patch_size=8, expected 16"):
        create_model(replace(recipe, tokenizer=str(tmp_path)))


def test_a_stage_that_is_not_there_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"no stage 'stage9'; its stages are \['stage1', 'stage2'\]"):
        train_hydra(recipe, tmp_path, only="stage9")


def test_a_stage_without_data_is_refused(recipe):
    with pytest.raises(ValueError, match=r"test needs data: a source for each of \['understand', 'generate'\]"):
        create_bundles(recipe, replace(STAGE1, data=None), seed=0)


# The tokens of training are those of inference


@pytest.mark.parametrize("drop_prompt", [0.0, 1.0])
def test_a_trained_drawing_has_the_tokens_of_a_drawn_one(recipe, drop_prompt):
    processor, tokenizer = recipe.processor, recipe.processor.tokenizer
    for sample in toy_language().generate_samples(8, hashed_generator(0, 0), drop_prompt=drop_prompt):
        batch = collate([sample], processor)
        text = sample.messages[0]["content"][0]["text"]
        assert (text == "") == bool(drop_prompt)
        prompt = tokenizer(processor.build_image_prompt(text))["input_ids"]
        image = [processor.image_token_id] * (1 + 16)
        rest = tokenizer("<|vision_end|><|im_end|>\n")["input_ids"]
        assert batch["input_ids"][0].tolist() == [*prompt, *image, *rest]


def test_the_null_prompt_of_the_config_is_the_trained_empty_prompt(recipe):
    sample = toy_language().generate_samples(1, hashed_generator(0, 0), drop_prompt=1.0)[0]
    ids = collate([sample], recipe.processor)["input_ids"][0].tolist()
    assert ids[: ids.index(recipe.processor.image_token_id)] == recipe.config.null_prompt_ids


def test_a_trained_question_has_the_tokens_of_an_asked_one(recipe):
    processor = recipe.processor
    for sample in toy_language().understand_samples(6, hashed_generator(0, 0), 3):
        batch = collate([sample], processor)
        asked = processor.apply_chat_template(
            sample.messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = asked["input_ids"].shape[1]
        assert torch.equal(asked["input_ids"], batch["input_ids"][:, :length])
        assert torch.equal(asked["mm_token_type_ids"], batch["mm_token_type_ids"][:, :length])
        torch.testing.assert_close(asked["pixel_values"], batch["pixel_values"])
        answer = sample.messages[1]["content"][0]["text"]
        expected = processor.tokenizer(f"{answer}<|im_end|>")["input_ids"]
        assert batch["labels"][0, length : length + len(expected)].tolist() == expected
        assert (batch["labels"][0, :length] == -100).all()
