"""A tower for images that learns clips: folds are added, trained on steps of images and steps of clips."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel, VideoMAEConfig, VideoMAEModel
from vision_tower_run import SIZES

from hydra_hf.data.images import MixedBatches
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.data.sources import Source, Sources
from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, HydraTokModel, PixelViTDecoderConfig
from hydra_hf.toy.batches import ToyBatches, ToyClipBatches, ToyData, toy_images
from hydra_hf.toy.clips import ToyClips, render_clips
from hydra_hf.toy.world import CANVAS, ToyWorld
from hydra_hf.training.dry_run import report_tower_stage
from hydra_hf.training.folds import fold_weights
from hydra_hf.training.image_trainer import TokenizerTrainer
from hydra_hf.training.latent_statistics import measure_latents
from hydra_hf.training.losses import frames_of, reached_parameters, training_inputs
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage
from hydra_hf.training.recipes import tiny
from hydra_hf.training.recipes.tiny_x import tokenizer
from hydra_hf.training.vision_tower_trainer import create_batches, create_stage_model, train_tokenizer


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


def test_a_tower_of_images_of_the_embedded_ones_size_can_learn_clips():
    recipe, config = tokenizer(), tiny.tokenizer_config()
    config.decoder_config = tiny.tokenizer().stages[-1].decoder_config
    model = create_stage_model(recipe, recipe.stages[0], HydraTokModel(config))
    assert isinstance(model, HydraTokForPreTraining)
    assert set(fold_weights(model.model)) == {PATCH_WEIGHT, "gen_vit.folds.2.projection.weight"}
    named = recipe.stages[0].learning_rates
    assert all(any(name.startswith(prefix) for name, _ in model.named_parameters()) for prefix in named)


# Teachers and harmonisation


@pytest.fixture(scope="module")
def semantics(tmp_path_factory) -> TokenizerStage:
    """Sem-ViT alone, after a teacher of images and one of clips, both with 2 x 2 patches where the student has 4 x 4."""
    folder, sizes = tmp_path_factory.mktemp("teachers"), {"num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    sizes |= {"hidden_size": 32, "intermediate_size": 16}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64, patch_size=32)).save_pretrained(folder / "images")
    video = VideoMAEConfig(**sizes | {"hidden_size": 24}, image_size=32, patch_size=16, num_frames=8, tubelet_size=2)
    VideoMAEModel(video).save_pretrained(folder / "clips")
    return replace(
        STAGE,
        name="harmonisation",
        keeps_image_latents=False,
        learning_rates={"model.sem_vit": 1e-3, "model.bottleneck.semantic_up_proj": 1e-3, "decompressor": 1e-3},
        muon_scale=0.0,
        loss_weights=TokenizerLossWeights(regression=0.0, kl=0.0, cosine=0.0, distill=1.0, video_distill=1.0),
        teacher=str(folder / "images"),
        video_teacher=str(folder / "clips"),
        video_teacher_size=24,
    )


@pytest.fixture(scope="module")
def harmonised(run, semantics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmonised")
    recipe = Recipe(
        name="test",
        config=CONFIG,
        stages=(semantics,),
        init=str(run / "decoder" / "final"),
        log_every=1,
        sample_every=4,
    )
    train_tokenizer(recipe, folder)
    return folder / "harmonisation"


def test_harmonisation_trains_sem_vit_alone_and_leaves_no_decompressor(run, harmonised):
    before, after = (
        HydraTokModel.from_pretrained(folder / "final").state_dict() for folder in (run / "decoder", harmonised)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    named = ("sem_vit", "bottleneck.semantic_up_proj")
    assert moved == {name for name in before if name.startswith(named) and before[name].numel()}


def test_the_video_term_is_zero_for_images_and_counts_for_clips(harmonised):
    records = [json.loads(line) for line in (harmonised / "log.jsonl").read_text().splitlines()]
    images = [record for record in records if "loss" in record]
    clips = [record for record in records if "clip_loss" in record]
    assert images
    assert clips
    assert all(
        record["video_distill"] == 0 and record["loss"] == pytest.approx(record["distill"]) for record in images
    )
    assert all(0 < record["clip_video_distill"] < 2 for record in clips)
    assert all(
        record["clip_loss"] == pytest.approx(record["clip_distill"] + record["clip_video_distill"]) for record in clips
    )


def test_steps_of_images_and_of_clips_give_a_gradient_to_every_parameter_that_is_trained(semantics, tmp_path):
    """Or DDP waits for it."""
    recipe = Recipe(name="test", config=CONFIG, stages=(semantics,))
    trainer = TokenizerTrainer(create_stage_model(recipe, semantics, None), semantics, *create_batches(recipe, semantics, 1), tmp_path)  # fmt: skip
    trained = {
        name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad and parameter.numel()
    }
    assert any(name.startswith("decompressor.") for name in trained)
    for kind in (False, True):
        step = next(step for step in range(99) if trainer.batches.has_clips(step) == kind)
        pixel_values = trainer.batches(step, range(4))
        outputs = trainer.model(pixel_values, **trainer.sample_noise(pixel_values, range(4)), distill_layers=())
        trainer.model.zero_grad()
        sum(trainer.tokenizer_losses(outputs, pixel_values).values()).backward()
        found = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
        assert trained <= found


def test_statistics_of_latents_are_measured_over_images_and_clips_after_a_stage_that_changes_them(
    run, world, clips, tmp_path
):
    stage = replace(STAGE, keeps_image_latents=False, num_steps=1, learning_rates={"model": 1e-3})
    recipe = Recipe(name="test", config=CONFIG, stages=(stage,), init=str(run / "decoder" / "final"))
    model = HydraTokModel.from_pretrained(train_tokenizer(recipe, tmp_path)).eval()
    assert not torch.equal(model.bottleneck.latents_std, torch.ones(4))
    batches = [toy_images(world, 4, hashed_generator(0, 0)), clips]
    model.set_latents_statistics(*measure_latents(model, iter(batches)))
    means = torch.cat(
        [model.encode(batch).latent_dist.mean.flatten(2).transpose(1, 2).flatten(0, 1) for batch in batches]
    )
    torch.testing.assert_close(means.mean(0), torch.zeros(4), rtol=0, atol=1e-3)


def test_data_without_clips_is_refused_before_anything_is_written(run, tmp_path):
    images = Sources((Source(task="generate", path="images"),))
    recipe = Recipe(name="test", config=CONFIG, stages=(replace(STAGE, data=images),), init=str(run / "images"))
    with pytest.raises(ValueError, match="data has no clips, which decoder needs: add video_generate=PATH"):
        train_tokenizer(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["video_teacher", "video_teacher_size", "clip_share"])
def test_a_video_loss_without_what_it_needs_is_refused(semantics, missing):
    with pytest.raises(ValueError, match="needs a video teacher and clips"):
        replace(semantics, **{missing: 0 if missing == "clip_share" else None})


def test_a_dry_run_counts_images_clips_and_the_decompressor(semantics):
    quarter, half, whole = (
        report_tower_stage(Recipe(name="test", config=CONFIG, stages=()), replace(semantics, clip_share=share))
        for share in (0.25, 0.5, 1.0)
    )
    total, trained = half.parameters["decompressor"]
    assert total == trained > 0
    assert half.flops == pytest.approx(quarter.flops + (whole.flops - quarter.flops) / 3)
    assert half.memory["activations"] == max(report.memory["activations"] for report in (quarter, whole))
