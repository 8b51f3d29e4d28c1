"""Trains vision towers (HYDRA-TOK): the stages of a recipe, and what each starts from. HYDRA, section 3.3."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from hydra_hf.data.images import Batches, HeldOut, MixedBatches
from hydra_hf.files import write_folder
from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, HydraTokModel
from hydra_hf.modeling.compat import enable_checkpointing

from .folds import FOLDS, add_folds, changes_image_latents
from .image_trainer import TokenizerTrainer
from .recipe import Recipe, TokenizerStage
from .stages import check_stage, run_stages


logger = logging.getLogger(__name__)

DECODER = ("pixel_decoder.", "bottleneck.decoder_up_proj.")


def train_tokenizer(
    recipe: Recipe, output_dir: Path, *, only: str | None = None, on_stage: Callable[[str], None] = logger.info
) -> Path:
    """Runs every stage that is not done yet, or `only` one; returns the folder of the finished vision tower.

    Raises ValueError, before anything is read or written, for a stage that the recipe does not have or that has no data.
    """
    check_stage(recipe, only)
    for stage in recipe.stages:
        if only in (None, stage.name):
            check_data(recipe, stage)

    def train(index: int, previous: Path | None, folder: Path) -> None:
        start = recipe.init if previous is None else previous
        model = None if start is None else HydraTokModel.from_pretrained(start)
        train_stage(recipe, recipe.stages[index], index, model, folder)

    return run_stages(recipe, output_dir, train, only=only, on_stage=on_stage)


def check_data(recipe: Recipe, stage: TokenizerStage) -> None:
    """Raises ValueError for a stage without images, or clips, to train on, or without held-out ones to measure it on."""
    data = recipe.data_of(stage)
    if data is None:
        raise ValueError(f"{recipe.name} needs data: images to train on, such as generate=PATH.")
    if stage.held_out is None:
        raise ValueError(f"{recipe.name}: {data=} needs held_out images too, which are not trained on.")
    for name, part in (("data", data), ("held_out", stage.held_out)):
        if stage.clip_share and not part.has_clips:
            raise ValueError(f"{recipe.name}: {name} has no clips, which {stage.name} needs: add video_generate=PATH.")


def create_batches(recipe: Recipe, stage: TokenizerStage, seed: int) -> tuple[Batches, HeldOut]:
    """What a stage is trained on, and what it is measured on. Raises ValueError if either is missing."""
    check_data(recipe, stage)
    size, data, held_out = recipe.config.image_size, recipe.data_of(stage), stage.held_out
    images = data.images(stage.image_sizes or (size,), stage.batch_size, seed)
    held_out_images = held_out.images((size,), stage.num_held_out, 0)
    if not stage.clip_share:
        return images, HeldOut(held_out_images)
    clips = data.clips(size, stage.num_frames, stage.batch_size // stage.images_per_clip, seed)
    held_out_clips = held_out.clips(size, stage.num_frames, stage.num_held_out_clips, 0)
    batches = MixedBatches(images, clips, stage.clip_share, stage.images_per_clip, seed)
    return batches, HeldOut(held_out_images, held_out_clips)


def train_stage(
    recipe: Recipe, stage: TokenizerStage, index: int, previous: HydraTokModel | None, folder: Path
) -> None:
    """Trains one stage and writes `folder/final`.

    The statistics of the latents are measured after every stage that changes those of images, and hold in the stages after it:
    Sem-ViT and flow read normalised latents, the decoder those before, as it was trained.
    """
    seed = recipe.seed + 1000 * index
    torch.manual_seed(seed)  # initial weights, the same whether or not earlier stages ran in this process
    batches, held_out = create_batches(recipe, stage, seed + 1)
    trainer = TokenizerTrainer(
        create_stage_model(recipe, stage, previous), stage, batches, held_out, folder,
        seed=seed, micro_batch_size=recipe.micro_batch_size,
        log_every=recipe.log_every, save_every=recipe.save_every, sample_every=recipe.sample_every,
    )  # fmt: skip
    model = trainer.train().eval()
    if changes_image_latents(model, stage):
        model.set_latents_statistics(*trainer.measure_latents(model))
    if trainer.accelerator.is_main_process:
        write_folder(folder / "final", model.save_pretrained)


def create_stage_model(
    recipe: Recipe, stage: TokenizerStage, previous: HydraTokModel | None
) -> HydraTokForPreTraining:
    """A model with the stage's decoder; the encoder (and the decoder, if of the same kind) are from the previous stage.

    Folds that the previous model does not have are added, see `add_folds`.

    Raises ValueError if the encoders, or two decoders of the same kind, do not have the same weights.
    """
    config = HydraTokConfig.from_dict({**recipe.config.to_dict(), "decoder_config": stage.decoder_config.to_dict()})
    model = HydraTokForPreTraining._from_config(
        config, attn_implementation=recipe.attn_implementation, video_teacher_size=stage.decompressed_size
    )
    if recipe.gradient_checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    if previous is None:
        return model
    weights, new = previous.state_dict(), model.model.state_dict()
    fresh: tuple[str, ...] = ()  # what the previous model does not have
    if type(previous.pixel_decoder) is not type(model.model.pixel_decoder):
        fresh += DECODER
    if config.temporal_fold_layers and not previous.reads_clips:
        weights, fresh = add_folds(weights, config), fresh + FOLDS
        logger.info("%s: adds folds to a model for images.", stage.name)
    weights, new = (
        {name: value for name, value in part.items() if not name.startswith(fresh)} for part in (weights, new)
    )
    shapes, expected = ({name: tuple(value.shape) for name, value in part.items()} for part in (weights, new))
    if wrong := sorted(name for name, _ in shapes.items() ^ expected.items()):
        name = wrong[0]
        raise ValueError(
            f"{stage.name}: {len(set(wrong))} weights of the previous model do not fit, such as {name}:"
            f" {shapes.get(name)}, expected {expected.get(name)}."
        )
    model.model.load_state_dict(weights, strict=False)  # what is missing is fresh
    return model
