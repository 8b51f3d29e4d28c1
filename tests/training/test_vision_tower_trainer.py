import copy
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vision_tower_run import SIZES

from hydra_hf.data.images import HeldOut
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.modeling import (
    HydraTokConfig,
    HydraTokForPreTraining,
    HydraTokModel,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
)
from hydra_hf.modeling.grid import latents_to_tokens
from hydra_hf.toy.batches import ToyBatches, ToyData, ToyHeldOut, toy_images
from hydra_hf.toy.world import CANVAS, ToyWorld
from hydra_hf.training.image_trainer import TokenizerTrainer
from hydra_hf.training.latent_statistics import measure_latents
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage
from hydra_hf.training.vision_tower_trainer import create_stage_model, train_tokenizer


VIT_DECODER = PixelViTDecoderConfig(num_hidden_layers=1, **SIZES)
FLOW_DECODER = PixelFlowDecoderConfig(num_global_layers=1, num_flow_layers=1, prediction_type="sample", **SIZES)
CONFIG = HydraTokConfig(
    num_gen_layers=1, num_sem_layers=1, image_size=64, latent_channels=4, use_cls_token=False, **SIZES
)
FOUNDATION = TokenizerStage(
    name="foundation",
    data=ToyData(),
    held_out=ToyData(is_held_out=True),
    num_steps=8,
    batch_size=4,
    learning_rates={"model.gen_vit": 1e-3, "model.bottleneck": 1e-3, "model.pixel_decoder": 1e-3},
    muon_scale=3.0,
    warmup_steps=2,
    decoder_config=VIT_DECODER,
    loss_weights=TokenizerLossWeights(cosine=0.1),
    mixed_precision="no",
)
DECODER = replace(
    FOUNDATION,
    name="decoder",
    num_steps=6,
    learning_rates={"model.pixel_decoder": 1e-3, "model.bottleneck.decoder_up_proj": 1e-3},
    decoder_config=FLOW_DECODER,
)
RECIPE = Recipe(name="test", config=CONFIG, stages=(FOUNDATION, DECODER), log_every=1, save_every=3, sample_every=8)


class KilledError(Exception):
    pass


class KillingBatches(ToyBatches):
    """Toy batches up to a step that never comes."""

    killed_at = None

    def __call__(self, step: int, rows: range) -> torch.Tensor:
        if step == self.killed_at:
            raise KilledError
        return super().__call__(step, rows)


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld(1)


@pytest.fixture
def make_trainer(world):
    """A trainer of one stage on the same first weights and data each time; `killed_at` is a step that never comes."""

    def make(folder, stage=FOUNDATION, killed_at=None, save_every=3, recipe=RECIPE) -> TokenizerTrainer:
        batches = KillingBatches(world, stage.batch_size, seed=1)
        batches.killed_at = killed_at
        torch.manual_seed(0)
        return TokenizerTrainer(
            create_stage_model(recipe, stage, None), stage, batches, HeldOut(ToyHeldOut(world, 16, seed=1)), folder,
            micro_batch_size=recipe.micro_batch_size, log_every=1, save_every=save_every, sample_every=100,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An unbroken run of both stages: its folder, and that of the finished tokenizer."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train_tokenizer(RECIPE, folder)


def losses_of(folder) -> dict[int, dict]:
    """The log by step; what a resumed run does again counts."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("stage", [FOUNDATION, DECODER], ids=lambda stage: stage.name)
def test_a_killed_and_resumed_run_ends_as_an_unbroken_one(make_trainer, tmp_path, stage):
    unbroken = make_trainer(tmp_path / "unbroken", stage).train()
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "killed", stage, killed_at=5).train()
    trainer = make_trainer(tmp_path / "killed", stage)
    resumed = trainer.train()
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "unbroken")
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)
    for name in ("model", "ema", "optimizer"):
        files = [
            tmp_path / run / f"checkpoint-{stage.num_steps}" / f"{name}.safetensors" for run in ("killed", "unbroken")
        ]
        torch.testing.assert_close(load_file(files[0]), load_file(files[1]), rtol=0, atol=0)


def test_a_killed_run_goes_on_from_its_checkpoint_and_not_from_the_start(make_trainer, tmp_path):
    with pytest.raises(KilledError):
        make_trainer(tmp_path, killed_at=5).train()
    make_trainer(tmp_path, killed_at=2).train()  # steps 0 to 2 are not asked for again


def test_a_mean_of_the_log_counts_only_the_steps_since_a_resume(make_trainer, tmp_path):
    make_trainer(tmp_path / "each").train()
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "four", killed_at=3).train()
    trainer = make_trainer(tmp_path / "four")
    trainer.log_every = 4
    trainer.train()
    each, four = losses_of(tmp_path / "each"), losses_of(tmp_path / "four")
    assert four[4]["loss"] == pytest.approx(each[4]["loss"])
    assert four[8]["loss"] == pytest.approx(sum(each[step]["loss"] for step in (5, 6, 7, 8)) / 4)


def test_a_run_killed_between_two_stages_ends_as_an_unbroken_one(finished, tmp_path):
    def kill_before_the_decoder(message: str) -> None:
        if "decoder" in message:
            raise KilledError

    with pytest.raises(KilledError):
        train_tokenizer(RECIPE, tmp_path, on_stage=kill_before_the_decoder)
    train_tokenizer(RECIPE, tmp_path)
    for stage in ("foundation", "decoder"):
        assert losses_of(tmp_path / stage) == losses_of(finished[0] / stage)
        files = [folder / stage / "final" / "model.safetensors" for folder in (tmp_path, finished[0])]
        torch.testing.assert_close(load_file(files[0]), load_file(files[1]), rtol=0, atol=0)


def test_a_finished_run_trains_nothing_when_it_is_called_again(finished):
    def fail(message: str) -> None:
        raise AssertionError(message)

    folder, final = finished
    log = (folder / "decoder" / "log.jsonl").read_text()
    assert train_tokenizer(RECIPE, folder, on_stage=fail) == final == folder / "decoder" / "final"
    assert (folder / "decoder" / "log.jsonl").read_text() == log


def test_the_loss_falls(make_trainer, tmp_path):
    stage = replace(FOUNDATION, num_steps=20, learning_rates={"model": 3e-3})
    make_trainer(tmp_path, stage, save_every=100).train()
    losses = [record["loss"] for record in losses_of(tmp_path).values()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_only_what_is_named_moves_and_all_of_it(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    parameters = {name for name, parameter in trainer.model.named_parameters() if parameter.numel()}
    named = {name for name in parameters if name.startswith(tuple(FOUNDATION.learning_rates))}
    assert moved(before, trainer.model.state_dict()) == named
    assert "model.bottleneck.semantic_up_proj.weight" in named  # by the cosine loss


def test_the_averaged_model_lags_behind_the_trained_one(make_trainer, tmp_path):
    stage = replace(FOUNDATION, ema_decay=0.1, num_steps=2)
    trainer = make_trainer(tmp_path, stage)
    weights = []
    for _ in range(2):
        trainer.train_step()
        trainer.step += 1
        weights.append(trainer.model.model.bottleneck.down_proj.weight.detach().clone())
    averaged = trainer.ema.module.model.bottleneck.down_proj.weight
    torch.testing.assert_close(averaged, 0.1 * weights[0] + 0.9 * weights[1])  # the first step is taken as it is


def test_the_decoder_stage_leaves_the_encoder_as_it_was(finished):
    first, second = (
        load_file(finished[0] / stage / "final" / "model.safetensors") for stage in ("foundation", "decoder")
    )
    decoder = ("pixel_decoder", "bottleneck.decoder_up_proj")
    encoder = {name: value for name, value in first.items() if not name.startswith(decoder)}
    torch.testing.assert_close({name: second[name] for name in encoder}, encoder, rtol=0, atol=0)
    assert {"bottleneck.latents_mean", "bottleneck.latents_std", "sem_vit.layers.0.mlp.fc1.weight"} <= set(encoder)


def test_a_stage_with_another_decoder_starts_from_the_encoder_before_it(finished):
    previous = HydraTokModel.from_pretrained(finished[0] / "foundation" / "final")
    model = create_stage_model(RECIPE, DECODER, previous).model
    assert isinstance(model.config.decoder_config, PixelFlowDecoderConfig)
    assert torch.equal(model.gen_vit.embeddings.projection.weight, previous.gen_vit.embeddings.projection.weight)
    assert not torch.equal(model.bottleneck.decoder_up_proj.weight, previous.bottleneck.decoder_up_proj.weight)


def test_a_stage_with_the_same_decoder_goes_on_with_it(finished):
    previous = HydraTokModel.from_pretrained(finished[1])
    model = create_stage_model(RECIPE, DECODER, previous).model
    torch.testing.assert_close(model.state_dict(), previous.state_dict(), rtol=0, atol=0)


def test_a_stage_with_another_encoder_than_the_one_before_is_refused(finished):
    previous = HydraTokModel.from_pretrained(finished[0] / "foundation" / "final")
    other = replace(RECIPE, config=HydraTokConfig.from_dict({**CONFIG.to_dict(), "latent_channels": 8}))
    with pytest.raises(ValueError, match=r"decoder: \d+ weights .* do not fit, such as bottleneck.* expected"):
        create_stage_model(other, DECODER, previous)
    deeper = replace(RECIPE, config=HydraTokConfig.from_dict({**CONFIG.to_dict(), "num_sem_layers": 2}))
    with pytest.raises(ValueError, match=r"do not fit, such as sem_vit.layers.1.*None, expected"):
        create_stage_model(deeper, DECODER, previous)


def test_a_stage_with_a_decoder_of_another_size_is_refused(finished):
    previous = HydraTokModel.from_pretrained(finished[1])
    larger = PixelFlowDecoderConfig.from_dict({**FLOW_DECODER.to_dict(), "num_flow_layers": 2})
    with pytest.raises(ValueError, match="do not fit, such as pixel_decoder"):
        create_stage_model(RECIPE, replace(DECODER, decoder_config=larger), previous)


def test_the_first_stage_starts_from_init(finished, tmp_path):
    stage = replace(DECODER, num_steps=1)
    recipe = replace(RECIPE, stages=(stage,), init=str(finished[0] / "foundation" / "final"))
    final = HydraTokModel.from_pretrained(train_tokenizer(recipe, tmp_path))
    previous = HydraTokModel.from_pretrained(recipe.init)
    assert torch.equal(final.gen_vit.embeddings.projection.weight, previous.gen_vit.embeddings.projection.weight)


def test_no_average_is_kept_at_a_decay_of_zero(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, replace(FOUNDATION, ema_decay=0.0))
    model = trainer.train()
    assert torch.equal(model.bottleneck.down_proj.weight, trainer.model.model.bottleneck.down_proj.weight)
    assert not (tmp_path / "checkpoint-8" / "ema.json").exists()


def test_pictures_that_are_never_trained_on_are_scored(finished):
    record = losses_of(finished[0] / "decoder")[6]
    assert 0 < record["psnr"] < 40
    assert -1 < record["ssim"] < 1


def test_the_sample_grid_shows_pictures_and_their_copies(finished):
    names = sorted(path.name for path in (finished[0] / "foundation").glob("*.png"))
    assert names == ["samples-000008.png"]
    grid = Image.open(finished[0] / "foundation" / names[0])
    assert grid.size == (
        8 * (CANVAS[1] + 2) + 2,
        4 * (CANVAS[0] + 2) + 2,
    )  # 16 pictures over their 16 copies, 8 in a row


def test_a_checkpoint_holds_no_pickle(finished):
    files = list((finished[0] / "decoder").rglob("*.*"))
    assert {path.suffix for path in files if path.is_file()} == {".json", ".jsonl", ".safetensors", ".png"}
    assert sorted(path.name for path in (finished[0] / "decoder").glob("checkpoint*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]


def test_a_finished_tokenizer_opens_in_transformers(finished, world):
    model = HydraTokModel.from_pretrained(finished[1]).eval()
    pixel_values = toy_images(world, 2, hashed_generator(0, 0))
    assert model.decode(model.encode(pixel_values).latent).sample.shape == pixel_values.shape


def test_a_training_batch_holds_pictures_depth_and_segmentations(world):
    images = toy_images(world, 5, hashed_generator(0, 0))
    assert images.shape == (5, 3, *CANVAS)
    assert images.abs().max() <= 1
    assert set(images[0].unique().tolist()) <= {-1.0, 0.0, 1.0}  # depth: background, far, near
    assert set(images[1].unique().tolist()) == {-1.0, 1.0}  # boundaries
    assert len(images[2:].unique()) > 10
    assert torch.equal(images, toy_images(world, 5, hashed_generator(0, 0)))


def test_noise_of_a_step_is_the_same_whenever_it_is_drawn(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, DECODER)
    pixel_values = torch.zeros(4, 3, *CANVAS)
    first, second = (trainer.sample_noise(pixel_values, range(4)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    half = trainer.sample_noise(pixel_values[2:], range(2, 4))  # as another process draws its rows
    torch.testing.assert_close(half, {name: value[2:] for name, value in first.items()}, rtol=0, atol=0)
    trainer.step = 1
    assert not torch.equal(trainer.sample_noise(pixel_values, range(4))["sigma"], first["sigma"])
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "latent_noise": (4, 16, 4), "pixel_noise": (4, 16, 768), "sigma": (4,)
    }  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_one_step_samples_is_that_of_sigma_one(make_trainer, tmp_path, share):
    trainer = make_trainer(tmp_path, replace(DECODER, one_step_prob=share))
    sigma = trainer.sample_noise(torch.zeros(64, 3, *CANVAS), range(64))["sigma"]
    assert (sigma == 1).float().mean() == share


# Statistics of the latents


@pytest.fixture
def untrained(world) -> tuple[HydraTokModel, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = HydraTokForPreTraining(
        HydraTokConfig.from_dict({**CONFIG.to_dict(), "decoder_config": VIT_DECODER.to_dict()})
    )
    return model.model.eval(), [toy_images(world, 5, hashed_generator(0, step)) for step in range(3)]


def sample_latents(model: HydraTokModel, batches: list[torch.Tensor], num_draws: int) -> torch.Tensor:
    """(number of tokens, C)."""
    generator = hashed_generator(0, 0)
    with torch.no_grad():
        dists = [model.encode(batch).latent_dist for batch in batches]
    draws = [latents_to_tokens(dist.sample(generator)) for dist in dists for _ in range(num_draws)]
    return torch.cat(draws).flatten(0, 1)


def test_latent_statistics_are_those_of_all_sampled_latents(untrained):
    model, batches = untrained
    mean, std = measure_latents(model, iter(batches))
    latents = sample_latents(model, batches, num_draws=2000)  # 480,000 tokens
    torch.testing.assert_close(mean, latents.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(std, latents.std(0), rtol=5e-3, atol=0)


def test_normalised_latents_have_zero_mean_and_unit_variance(untrained):
    model, batches = untrained
    model.set_latents_statistics(*measure_latents(model, iter(batches)))
    latents = sample_latents(model, batches, num_draws=2000)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), rtol=0, atol=5e-3)
    torch.testing.assert_close(latents.std(0), torch.ones(4), rtol=5e-3, atol=0)


def test_shares_of_the_batches_add_up_to_the_statistics_of_all(untrained):
    """As processes do it: each has some of the batches, `add_up` the sums of the others."""
    model, batches = untrained
    shares = []
    measure_latents(model, iter(batches[:1]), lambda sums: shares.append(sums) or sums)
    both = measure_latents(model, iter(batches[1:]), lambda sums: sums + shares[0])
    torch.testing.assert_close(both, measure_latents(model, iter(batches)))


def test_measuring_a_normalised_model_gives_the_same_statistics(untrained):
    model, batches = untrained
    first = measure_latents(model, iter(batches))
    model.set_latents_statistics(*first)
    torch.testing.assert_close(measure_latents(model, iter(batches)), first)


def test_the_finished_foundation_has_latent_statistics(finished):
    bottleneck = HydraTokModel.from_pretrained(finished[0] / "foundation" / "final").bottleneck
    assert not torch.equal(bottleneck.latents_std, torch.ones(4))
    assert not torch.equal(bottleneck.latents_mean, torch.zeros(4))
