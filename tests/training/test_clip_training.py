"""A tower for images that learns clips: folds are added, trained on steps of images and steps of clips."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from vision_tower_run import SIZES

from hydra_hf.data.images import MixedBatches
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, HydraTokModel, PixelViTDecoderConfig
from hydra_hf.toy.batches import ToyBatches, ToyClipBatches, ToyData, toy_images
from hydra_hf.toy.clips import ToyClips, render_clips
from hydra_hf.toy.world import CANVAS, ToyWorld
from hydra_hf.training.folds import fold_weights
from hydra_hf.training.losses import frames_of, reached_parameters, training_inputs
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage
from hydra_hf.training.recipes.tiny_x import tokenizer
from hydra_hf.training.vision_tower_trainer import create_stage_model, train_tokenizer


IMAGE_CONFIG = HydraTokConfig(num_gen_layers=2, num_sem_layers=1, image_size=64, latent_channels=4, **SIZES)
DECODER = PixelViTDecoderConfig(num_hidden_layers=2, temporal_unfold_layers=[1, 2], **SIZES)
CONFIG = HydraTokConfig.from_dict({**IMAGE_CONFIG.to_dict(), "temporal_fold_layers": [0, 1]})
PATCH_WEIGHT, FOLD_WEIGHT = "gen_vit.embeddings.projection.weight", "gen_vit.folds.1.projection.weight"
STAGE = TokenizerStage(
    name="decoder",
    data=ToyData(),
    held_out=ToyData(is_held_out=True),
    num_steps=4,
    batch_size=4,
    clip_share=0.5,
    num_frames=9,
    images_per_clip=2,
    keeps_image_latents=True,
    learning_rates={f"model.{PATCH_WEIGHT}": 1e-3, f"model.{FOLD_WEIGHT}": 1e-3, "model.pixel_decoder": 1e-3,
                    "model.bottleneck.decoder_up_proj": 1e-3},
    muon_scale=3.0,
    weight_decay=0.0,
    warmup_steps=1,
    ema_decay=0.0,
    decoder_config=DECODER,
    loss_weights=TokenizerLossWeights(cosine=0.0),
    mixed_precision="no",
    num_held_out=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld(1)


@pytest.fixture(scope="module")
def clips(world) -> torch.Tensor:
    return render_clips(world, ToyClips(world).sample(2, hashed_generator(0, 0), num_movers=(1,), num_frames=9))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tower for images, and that of a run that adds clips to it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    HydraTokModel(IMAGE_CONFIG).save_pretrained(folder / "images")
    recipe = Recipe(
        name="test", config=CONFIG, stages=(STAGE,), init=str(folder / "images"), log_every=1, sample_every=4
    )
    train_tokenizer(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def models(run) -> tuple[HydraTokModel, HydraTokModel]:
    """The tower for images, and the one that has learnt clips."""
    return tuple(HydraTokModel.from_pretrained(run / name).eval() for name in ("images", "decoder/final"))


@torch.no_grad()
def encode(model: HydraTokModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.encode(pixel_values).latent_dist.parameters


def test_latents_of_images_are_bit_equal_after_clips_were_learnt(models, world):
    for canvas in (CANVAS, (48, 96)):
        images = toy_images(world, 4, hashed_generator(0, 0), canvas)
        assert torch.equal(*(encode(model, images) for model in models))


def test_what_reads_the_frames_before_an_anchor_is_trained_and_the_rest_of_the_encoder_is_not(models):
    before, after = (model.state_dict() for model in models)
    encoder = [
        name for name in before if name.startswith(("gen_vit", "bottleneck.down_proj")) and name != PATCH_WEIGHT
    ]
    torch.testing.assert_close([before[name] for name in encoder], [after[name] for name in encoder], rtol=0, atol=0)
    earlier, anchor = after[PATCH_WEIGHT].split(3, dim=1)
    assert torch.equal(anchor, before[PATCH_WEIGHT])
    assert earlier.abs().amax() > 0
    earlier, anchor = after[FOLD_WEIGHT].split(32, dim=1)
    assert torch.equal(anchor, torch.eye(32))
    assert earlier.abs().amax() > 0
    assert not after["gen_vit.folds.1.projection.bias"].any()


def test_a_clip_starts_as_the_last_frame_of_each_group(models, clips):
    """Folds are the identity at first, so a frame that no fold has merged yet is encoded as an image."""
    recipe = Recipe(name="test", config=CONFIG, stages=(STAGE,))
    model = create_stage_model(recipe, STAGE, models[0]).model.eval()
    layout = model.gen_vit.embeddings(model.normalize_pixels(clips))
    frames = model.gen_vit.embeddings(model.normalize_pixels(frames_of(clips[:, :, ::2])))
    torch.testing.assert_close(layout.flatten(), frames.flatten(), rtol=0, atol=1e-5)


def test_steps_of_images_and_of_clips_are_logged_apart_and_both_are_measured(run):
    records = [json.loads(line) for line in (run / "decoder" / "log.jsonl").read_text().splitlines()]
    names = [{"regression", "clip_regression"} & set(record) for record in records]
    assert all(len(found) == 1 for found in names)
    assert set.union(*names) == {"regression", "clip_regression"}
    assert {"psnr", "ssim", "clip_psnr", "clip_ssim"} <= set(records[-1])


def test_samples_of_clips_are_rows_of_frames(run):
    grid = Image.open(run / "decoder" / "clips-000004.png")
    assert grid.size == (
        9 * (CANVAS[1] + 2) + 2,
        4 * (CANVAS[0] + 2) + 2,
    )  # two clips of nine frames over their copies


def test_what_a_step_has_depends_on_its_number_and_the_seed_alone(world):
    images, clips = ToyBatches(world, 8, 1), ToyClipBatches(ToyClips(world), 9, 4, 1)
    batches, same = (MixedBatches(images, clips, 0.25, 2, seed=3) for _ in range(2))
    kinds = [batches.has_clips(step) for step in range(400)]
    assert kinds == [same.has_clips(step) for step in range(400)]
    assert kinds != [MixedBatches(images, clips, 0.25, 2, seed=4).has_clips(step) for step in range(400)]
    assert 0.2 < sum(kinds) / 400 < 0.3
    step = kinds.index(True)
    whole = batches(step, range(8))
    assert whole.shape == (4, 3, 9, *CANVAS)
    assert torch.equal(batches(step, range(4, 6)), whole[2:3])
    assert batches(kinds.index(False), range(4, 6)).shape == (2, 3, *CANVAS)


def test_clips_of_the_test_split_are_the_same_at_every_step(world):
    held_out, training = (ToyClipBatches(ToyClips(world), 9, 2, 1, split) for split in ("test", "train"))
    assert torch.equal(held_out(0, range(2)), held_out(7, range(2)))
    assert not torch.equal(training(0, range(2)), training(7, range(2)))


def test_clips_reach_the_same_parameters_as_images():
    stage = replace(STAGE, loss_weights=TokenizerLossWeights())
    with torch.device("meta"):
        model = create_stage_model(Recipe(name="test", config=CONFIG, stages=(stage,)), stage, None)
        outputs = model(**training_inputs(model.config, 1, num_frames=9))
        parts = (outputs.clean_pixel_values, outputs.mean, outputs.logvar, outputs.bottleneck_states)
        sum(part.mean() for part in parts).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == reached_parameters(model, stage)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight_decay": 0.1}, "weight_decay=0.1 changes the latents of images"),
        ({"clip_share": 1.5}, "clip_share=1.5 must be 0 to 1"),
        ({"images_per_clip": 0}, "images_per_clip=0 at least 1"),
    ],
)
def test_wrong_settings_of_clips_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rates": {"model.gen_vit": 1e-3}}, "got a learning rate for gen_vit.embeddings.cls_token"),
        ({"images_per_clip": 3}, "4 images of a process at once must be a multiple of images_per_clip=3"),
    ],
)
def test_a_stage_that_cannot_run_is_refused_before_it_starts(run, tmp_path, changes, message):
    recipe = Recipe(name="test", config=CONFIG, stages=(replace(STAGE, **changes),), init=str(run / "images"))
    with pytest.raises(ValueError, match=message):
        train_tokenizer(recipe, tmp_path)


def test_the_tower_of_the_embedded_checkpoint_can_learn_clips():
    recipe = tokenizer()
    model = create_stage_model(recipe, recipe.stages[0], HydraTokModel.from_pretrained(recipe.init))
    assert isinstance(model, HydraTokForPreTraining)
    assert set(fold_weights(model.model)) == {PATCH_WEIGHT, "gen_vit.folds.2.projection.weight"}
    named = recipe.stages[0].learning_rates
    assert all(any(name.startswith(prefix) for name, _ in model.named_parameters()) for prefix in named)
