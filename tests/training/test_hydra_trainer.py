import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hydra_hf.data.collate import collate
from hydra_hf.data.sample import Sample
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.training.hydra_trainer import (
    HydraTrainer,
    ToyBundles,
    create_model,
    last_complete_checkpoint,
    train_hydra,
)
from hydra_hf.training.recipe import HydraRecipe, HydraStage
from hydra_hf.training.tokenizer_trainer import step_generator
from toy import toy_config, toy_language, toy_pipeline, toy_processor


TOWER = "model.vision_tower."
HEADS = {"vision_head": 1e-3, f"{TOWER}sem_vit": 1e-3, f"{TOWER}bottleneck.semantic_up_proj": 1e-3,
         "model.multi_modal_projector": 1e-3, "model.time_embedding": 1e-3}  # fmt: skip
STAGE1 = HydraStage(
    name="stage1",
    num_steps=5,
    learning_rates=HEADS,
    tasks={"understand": 2, "generate": 3},
    muon_scale=3.0,
    warmup_steps=2,
    mixed_precision="no",
)
STAGE2 = replace(STAGE1, name="stage2", num_steps=3, learning_rates={**HEADS, "model.language_model": 1e-3})


class KilledError(Exception):
    pass


class BundlesOfAKilledRun(ToyBundles):
    """The loader is one bundle ahead, so the run ends before it has done the step in front of this one."""

    def __getitem__(self, step: int) -> dict:
        if step == 4:
            raise KilledError
        return super().__getitem__(step)


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
    def make(folder, stage=STAGE1, bundles=ToyBundles) -> HydraTrainer:
        folder.mkdir(exist_ok=True)
        bundles = bundles(toy_language(), recipe.processor, stage, seed=0)
        return HydraTrainer(create_model(recipe), stage, bundles, folder, seed=0, log_every=1, save_every=2)

    return make


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """An unbroken run of both stages: its folder, and that of the finished pipeline."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train_hydra(recipe, folder)


def losses_of(folder) -> dict[int, dict]:
    """The named losses by step; what a resumed run does again counts."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        record["step"]: {name: record[name] for name in ("loss", "language", "flow", "grad_norm", "learning_rate")}
        for record in records
        if "loss" in record
    }


def trained(model: nn.Module, stage: HydraStage) -> set[str]:
    return {name for name, p in model.named_parameters() if name.startswith(tuple(stage.learning_rates)) and p.numel()}


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    others = dict(after.named_parameters())
    return {name for name, parameter in before.named_parameters() if not torch.equal(parameter, others[name])}


# Runs


def test_a_killed_and_resumed_run_ends_as_an_unbroken_one(make_trainer, tmp_path):
    unbroken = make_trainer(tmp_path / "unbroken")
    unbroken.train()
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "killed", bundles=BundlesOfAKilledRun).train()
    checkpoint = last_complete_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-2")
    resumed = make_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=checkpoint)
    losses = losses_of(tmp_path / "killed")
    assert losses == losses_of(tmp_path / "unbroken")
    assert list(losses) == [1, 2, 3, 4, 5]
    torch.testing.assert_close(resumed.model.state_dict(), unbroken.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.ema.state_dict(), unbroken.ema.state_dict(), rtol=0, atol=0)
    files = [tmp_path / run / "checkpoint-5" / "optimizer.safetensors" for run in ("killed", "unbroken")]
    torch.testing.assert_close(load_file(files[0]), load_file(files[1]), rtol=0, atol=0)


def test_an_incomplete_checkpoint_is_passed_over(finished, tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in ((4, '{"global_step": 4}'), (6, '{"global_st'), (10, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    newest = last_complete_checkpoint(finished[0] / "stage1")
    assert newest == str(finished[0] / "stage1" / "checkpoint-5")


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
    bundles = ToyBundles(toy_language(), recipe.processor, STAGE1, seed=0)
    first, other, again = bundles[2], bundles[3], bundles[2]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["generate"]["pixel_values"], other["generate"]["pixel_values"])
    assert len(bundles) == STAGE1.num_steps
    assert [len(first[task]["pixel_values"]) for task in STAGE1.tasks] == [2, 3]


def test_a_task_that_the_toy_world_does_not_have_is_refused(recipe):
    bundles = ToyBundles(toy_language(), recipe.processor, replace(STAGE1, tasks={"edit": 1}), seed=0)
    with pytest.raises(ValueError, match="task='edit' of stage 'stage1'"):
        bundles[0]


# One step


def edit_batch(recipe, num_samples: int = 1) -> dict:
    """Samples with a given image, some text of the assistant, and a generated image."""
    generator = step_generator(0, 0)
    images = toy_language().world.render(toy_language().world.sample_scenes(2 * num_samples, generator)).split(2)
    samples = [
        Sample(task="edit", messages=[
            {"role": "user", "content": [{"type": "image", "image": given}, {"type": "text", "text": "a cat"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a dog"}, {"type": "image", "image": made}]},
        ])
        for given, made in images
    ]  # fmt: skip
    return collate(samples, recipe.processor)


def test_noise_is_put_on_generated_images_only(make_trainer, recipe, tmp_path):
    trainer, batch = make_trainer(tmp_path), edit_batch(recipe, 2)
    clean = trainer.model.encode_images(batch["pixel_values"])
    prepared, num_labels, num_drawn = trainer.prepare_batch(batch, step_generator(0, 0))
    given, generated = slice(0, None, 2), slice(1, None, 2)
    assert prepared["sigma"][given].tolist() == [0, 0]
    assert (prepared["sigma"][generated] > 0).all()
    assert torch.equal(prepared["latents"][given], clean[given])
    sigma = prepared["sigma"][generated][:, None, None, None]
    target = prepared["velocity_target"]
    assert len(target) == 2
    torch.testing.assert_close(prepared["latents"][generated], clean[generated] + sigma * target)
    assert (num_labels, num_drawn) == (2 * 2, 2 * 16)
    assert "pixel_values" not in prepared
    assert "pixel_values" in batch  # the caller's bundle is as it was


def test_text_to_image_has_no_labels_and_no_logits_of_the_prompt(make_trainer, recipe, tmp_path):
    samples = toy_language().generate_samples(2, step_generator(0, 0))
    prepared, num_labels, num_drawn = make_trainer(tmp_path).prepare_batch(
        collate(samples, recipe.processor), step_generator(0, 0)
    )
    assert "labels" not in prepared
    assert prepared["logits_to_keep"] == 1
    assert (num_labels, num_drawn) == (0, 2 * 16)


def test_understanding_has_neither_noise_nor_a_velocity(make_trainer, recipe, tmp_path):
    samples = toy_language().understand_samples(2, step_generator(0, 0), 3)
    prepared, num_labels, num_drawn = make_trainer(tmp_path).prepare_batch(
        collate(samples, recipe.processor), step_generator(0, 0)
    )
    assert prepared["sigma"].tolist() == [0, 0]
    assert {"is_generated", "velocity_target"}.isdisjoint(prepared)
    assert num_drawn == 0
    assert num_labels == (prepared["labels"] >= 0).sum()


@torch.no_grad()
def test_the_language_loss_is_the_mean_over_the_tokens_of_all_tasks(make_trainer, recipe, tmp_path):
    trainer = make_trainer(tmp_path)
    short, long = (
        collate(toy_language().understand_samples(count, step_generator(0, count), questions), recipe.processor)
        for count, questions in ((1, 1), (3, 4))
    )
    loss, outputs = trainer.compute_loss(
        trainer.model, {"understand": short, "generate": long, "step": 0}, return_outputs=True
    )
    logits = torch.cat([outputs[task].logits[:, :-1].flatten(0, 1) for task in ("understand", "generate")])
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in (short, long)])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))
    assert trainer.loss_history["language"] == [pytest.approx(loss.item())]


@torch.no_grad()
def test_the_flow_loss_is_the_mean_over_the_image_tokens_of_all_tasks(make_trainer, recipe, tmp_path):
    trainer = make_trainer(tmp_path, replace(STAGE1, loss_weights=replace(STAGE1.loss_weights, language=0.0)))
    for parameter in trainer.model.vision_head.out_proj.parameters():
        parameter.fill_(0.05)
    batches = {"understand": edit_batch(recipe, 1), "generate": edit_batch(recipe, 3)}
    loss, outputs = trainer.compute_loss(trainer.model, {**batches, "step": 5}, return_outputs=True)
    generator = step_generator(0, 5 + (1 << 31))
    targets = torch.cat([trainer.prepare_batch(batches[task], generator)[0]["velocity_target"] for task in batches])
    velocity = torch.cat([outputs[task].velocity for task in batches])
    torch.testing.assert_close(loss, ((velocity - targets) ** 2).mean())


# The tokens of training are those of inference


@pytest.mark.parametrize("drop_prompt", [0.0, 1.0])
def test_a_trained_drawing_has_the_tokens_of_a_drawn_one(recipe, drop_prompt):
    processor, tokenizer = recipe.processor, recipe.processor.tokenizer
    for sample in toy_language().generate_samples(8, step_generator(0, 0), drop_prompt=drop_prompt):
        batch = collate([sample], processor)
        text = sample.messages[0]["content"][0]["text"]
        assert (text == "") == bool(drop_prompt)
        prompt = tokenizer(processor.build_image_prompt(text))["input_ids"]
        image = [processor.image_token_id] * (1 + 16)
        rest = tokenizer("<|vision_end|><|im_end|>\n")["input_ids"]
        assert batch["input_ids"][0].tolist() == [*prompt, *image, *rest]


def test_the_null_prompt_of_the_config_is_the_trained_empty_prompt(recipe):
    sample = toy_language().generate_samples(1, step_generator(0, 0), drop_prompt=1.0)[0]
    ids = collate([sample], recipe.processor)["input_ids"][0].tolist()
    assert ids[: ids.index(recipe.processor.image_token_id)] == recipe.config.null_prompt_ids


def test_a_trained_question_has_the_tokens_of_an_asked_one(recipe):
    processor = recipe.processor
    for sample in toy_language().understand_samples(6, step_generator(0, 0), 3):
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
