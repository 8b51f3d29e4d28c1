"""A budget of tokens in the place of a count: the same losses and gradients, whatever the budget."""

from dataclasses import replace

import hydra_run
import pytest
import torch
from hydra_run import EVERYTHING
from torch import Tensor

from hydra_hf.data.collate import collate
from hydra_hf.data.packing import count_micro_batches, sample_lengths, split_bundle
from hydra_hf.data.sample import Sample
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.training.bundle_trainer import BundleTrainer
from hydra_hf.training.checkpoints import last_whole_checkpoint
from hydra_hf.training.hydra_trainer import create_held_out, create_model
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.randomness import row_generator
from hydra_hf.training.recipe import HydraRecipe


TASKS = {"text": 3, "understand": 4, "generate": 5}
SIZES = [(16, 48), (32, 32), (16, 48), (64, 64), (16, 16)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> HydraRecipe:
    return hydra_run.recipe(tmp_path_factory.mktemp("recipe"), TASKS)


def make_trainer(
    recipe: HydraRecipe, folder, max_tokens: int | None = None, bundles=ToyBundles, held_out=()
) -> BundleTrainer:
    folder.mkdir(exist_ok=True)
    stage = recipe.stages[0]
    recipe = replace(recipe, max_length=min(512, max_tokens or 512) // len(stage.tasks), micro_batch_tokens=max_tokens)
    data = bundles(ToyData(), recipe.processor, stage, seed=0)
    return BundleTrainer(
        create_model(recipe),
        HydraObjective(stage, seed=0),
        stage,
        data,
        folder,
        recipe=recipe,
        seed=0,
        held_out=held_out,
    )


def mixed_bundle(recipe: HydraRecipe) -> dict:
    """Text alone, questions about up to two images, and images to draw, of many sizes and lengths."""

    def picture(number: int) -> dict:
        pixels = torch.rand(3, *SIZES[number], generator=row_generator(0, 0, number))
        return {"type": "image", "image": 2 * pixels - 1}

    def sample(task: str, user: list[dict], assistant: dict) -> Sample:
        return Sample(
            task=task, messages=[{"role": "user", "content": user}, {"role": "assistant", "content": [assistant]}]
        )

    texts = [{"type": "text", "text": " ".join(["a red cat"] * repeats)} for repeats in (1, 2, 6, 9)]
    samples = {
        "text": [sample("text", [texts[index]], texts[2 - index]) for index in range(3)],
        "understand": [
            sample("understand", [*map(picture, numbers), texts[0]], texts[index])
            for index, numbers in enumerate([(0,), (1, 2), (3,), (4, 0)])
        ],
        "generate": [sample("generate", [texts[number % 4]], picture(number)) for number in range(5)],
    }
    bundle = {"step": 0, "micro_step": 0, "skipped": {}, "rows": {task: list(range(n)) for task, n in TASKS.items()}}
    for task, own in samples.items():
        bundle[task] = {**collate(own, recipe.processor), "num_samples": len(own)}
    return bundle


def step(trainer: BundleTrainer, bundle: dict) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses of one optimizer step, by task and name, and the gradients."""
    (bundle,), counts = trainer.get_batch_samples(iter([bundle]), 1, torch.device("cpu"))
    trainer.training_step(trainer.model, bundle, counts)
    losses = trainer.losses.collect(trainer.accelerator)
    return losses, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def totals(bundle: dict) -> tuple[int, int]:
    """Tokens of all samples, and of the longest of each task."""
    lengths = [sample_lengths(bundle[task]) for task in TASKS]
    return sum(map(sum, lengths)), sum(map(max, lengths))


def test_losses_and_gradients_do_not_depend_on_the_budget(recipe, tmp_path):
    bundle = mixed_bundle(recipe)
    everything, longest = totals(bundle)
    expected_losses, expected = step(make_trainer(recipe, tmp_path / "padded"), bundle)
    assert set(expected_losses) == {"text/language", "understand/language", "generate/language", "generate/flow"}
    assert {name for name in EVERYTHING if any(key.startswith(name) for key in expected)} == set(EVERYTHING)
    for max_tokens, number in ((everything, 1), (everything - 1, 2), (longest, 4)):
        assert count_micro_batches(bundle, TASKS, max_tokens) == number
        losses, gradients = step(make_trainer(recipe, tmp_path / str(max_tokens), max_tokens), bundle)
        assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1.1e-5)  # the log has five digits
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_a_part_more_than_there_are_samples_changes_nothing(recipe, tmp_path, monkeypatch):
    """As on a process whose samples are shorter than those of another."""
    bundle = mixed_bundle(recipe)
    expected_losses, expected = step(make_trainer(recipe, tmp_path / "padded"), bundle)
    trainer, sizes = make_trainer(recipe, tmp_path / "packed", 512), []
    monkeypatch.setattr(trainer.accelerator, "gather", lambda numbers: torch.cat([numbers, torch.tensor([7])]))
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    losses, gradients = step(trainer, bundle)
    assert len(sizes) == 7 * len(TASKS)
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1.1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_the_noise_of_a_sample_does_not_depend_on_its_row(recipe, tmp_path):
    bundle, trainer = mixed_bundle(recipe), make_trainer(recipe, tmp_path)
    whole = trainer.objective.prepare(trainer.model, bundle, "generate")
    tokens = whole["image_grid_thw"].prod(dim=1).tolist()
    for part in split_bundle(bundle, TASKS, 2):
        rows = part["rows"]["generate"]
        prepared = trainer.objective.prepare(trainer.model, part, "generate")
        assert torch.equal(prepared["sigma"], whole["sigma"][rows])
        targets = whole["velocity_target"].split(tokens)
        torch.testing.assert_close(prepared["velocity_target"], torch.cat([targets[row] for row in rows]))


# Runs


class KilledError(Exception):
    pass


class BundlesOfAKilledRun(ToyBundles):
    def __getitem__(self, index: int) -> dict:
        if index == 1:
            raise KilledError
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> HydraRecipe:
    recipe = hydra_run.recipe(tmp_path_factory.mktemp("toy"), {"understand": 3, "generate": 4}, num_steps=2)
    return replace(recipe, save_every=1)


def test_a_packed_run_ends_as_a_padded_one_and_resumes_exactly(toy, tmp_path):
    padded, packed = make_trainer(toy, tmp_path / "padded"), make_trainer(toy, tmp_path / "packed", 150)
    assert count_micro_batches(packed.train_dataset[0], toy.stages[0].tasks, 150) > 1
    padded.train()
    packed.train()
    torch.testing.assert_close(packed.model.state_dict(), padded.model.state_dict(), rtol=1e-5, atol=1e-5)
    with pytest.raises(KilledError):
        make_trainer(toy, tmp_path / "killed", 150, bundles=BundlesOfAKilledRun).train()
    resumed = make_trainer(toy, tmp_path / "killed", 150)
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path / "killed"))
    torch.testing.assert_close(resumed.model.state_dict(), packed.model.state_dict(), rtol=0, atol=0)


def test_held_out_losses_do_not_depend_on_the_budget(toy, tmp_path):
    stage = replace(toy.stages[0], held_out=ToyData(is_held_out=True), num_held_out=3)
    held_out = create_held_out(toy, stage)
    measured = []
    for max_tokens in (None, 150):
        trainer = make_trainer(toy, tmp_path / str(max_tokens), max_tokens, held_out=held_out)
        trainer.model_wrapped = trainer.model
        measured.append(trainer.measure_held_out())
    assert set(measured[0]) == {"held_out/understand/language", "held_out/generate/language", "held_out/generate/flow"}
    assert measured[1] == pytest.approx(measured[0], rel=1e-5, abs=1.1e-5)


# What is refused


def test_a_budget_that_might_not_hold_a_sample_of_every_task_is_refused(recipe):
    with pytest.raises(
        ValueError, match=r"micro_batch_tokens=1535 must hold .* up to 3 x max_length=512; lower max_length"
    ):
        replace(recipe, micro_batch_tokens=1535)
    assert replace(recipe, micro_batch_tokens=1536).micro_batch_tokens == 1536
    assert replace(recipe, micro_batch_tokens=300, max_length=100).max_length == 100


def test_a_count_next_to_a_budget_is_refused(recipe):
    with pytest.raises(ValueError, match="got micro_batch_size=8 and micro_batch_tokens=2048"):
        replace(recipe, micro_batch_size=8, micro_batch_tokens=2048)
