"""Trains HYDRA: the stages of a recipe, and the pipelines that they write. HYDRA, section 2.2."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hydra_hf.files import write_folder
from hydra_hf.hub import subfolder_of
from hydra_hf.modeling import HydraConfig, HydraForConditionalGeneration, HydraTokConfig, HydraTokModel
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .bundle_trainer import BundleTrainer
from .callbacks import SampleGrids, create_pipeline
from .latents import check_latents
from .lora import describe_modules, has_adapters, merge_adapters, save_adapters
from .objective import HydraObjective, ModelKind
from .painted_grids import PaintedGrids, paint_hydra
from .processes import num_accumulation_steps, partial_state
from .recipe import Data, HydraRecipe, HydraStage
from .stages import check_stage, run_stages


logger = logging.getLogger(__name__)


class HydraKind:
    """What a run does with HYDRA apart from its steps; see `objective.ModelKind`."""

    def create_objective(self, stage: HydraStage, seed: int) -> HydraObjective:
        return HydraObjective(stage, seed)

    def create_model(self, recipe: HydraRecipe) -> HydraForConditionalGeneration:
        return create_model(recipe)

    def check_data(self, model: HydraForConditionalGeneration, stage: HydraStage, data: Data) -> None:
        check_latents(model, stage, data)
        tower = model.model.vision_tower
        if stage.loss_weights.pixels and (tower.pixel_decoder is None or tower.decodes_from_noise):
            decoder = type(tower.config.decoder_config).__name__
            raise ValueError(f"{stage.name}: the loss of pixels needs a decoder that regresses pixels, got {decoder}.")

    def open_model(self, folder: Path, recipe: HydraRecipe) -> HydraForConditionalGeneration:
        return open_model(folder, recipe)

    def empty_model(self, recipe: HydraRecipe) -> HydraForConditionalGeneration:
        return HydraForConditionalGeneration._from_config(recipe.config)

    def save(self, model: HydraForConditionalGeneration, recipe: HydraRecipe, folder: Path) -> None:
        create_pipeline(model, recipe).save_pretrained(folder)

    def save_compact(self, model: HydraForConditionalGeneration, recipe: HydraRecipe, folder: Path) -> None:
        save_compact(create_pipeline(model, recipe), folder)

    def add_samples(self, trainer: BundleTrainer, recipe: HydraRecipe, stage: HydraStage, folder: Path) -> None:
        if prompts := list(recipe.sample_prompts or recipe.data_of(stage).sample_prompts(recipe.seed)):
            trainer.add_callback(SampleGrids(trainer, recipe, prompts, folder))
        if trainer.held_out:
            trainer.add_callback(PaintedGrids(trainer, recipe, paint_hydra, folder))


def train_hydra(
    recipe: HydraRecipe, output_dir: Path, *, only: str | None = None, on_stage: Callable[[str], None] = logger.info
) -> Path:
    """`train_model` for HYDRA. Also raises ValueError for a recipe without a processor."""
    check_stage(recipe, only)
    if recipe.processor is None:
        raise ValueError(
            f"{recipe.name} needs init, the folder that `hydra convert` made, for its weights and tokenizer."
        )
    return train_model(HydraKind(), recipe, output_dir, only=only, on_stage=on_stage)


def train_model(
    kind: ModelKind,
    recipe: HydraRecipe,
    output_dir: Path,
    *,
    only: str | None = None,
    on_stage: Callable[[str], None] = logger.info,
) -> Path:
    """Runs every stage that is not done yet, or `only` one; returns the folder of the finished model.

    A stage starts from the last finished one before it, the first from what `kind.create_model` returns.
    Raises ValueError for a stage that the recipe does not have, or a recipe that cannot be trained.
    """

    def train(index: int, previous: Path | None, folder: Path) -> None:
        model = kind.create_model(recipe) if previous is None else kind.open_model(previous, recipe)
        train_stage(kind, recipe, index, model, folder, on_stage)

    def finish(last: Path, final: Path) -> None:
        model = kind.open_model(last, recipe)
        sized = recipe.sized_for(recipe.stages[-1])
        write_folder(final, lambda folder: kind.save_compact(model, sized, folder))

    return run_stages(recipe, output_dir, train, finish=finish, only=only, on_stage=on_stage)


def train_stage(
    kind: ModelKind,
    recipe: HydraRecipe,
    index: int,
    model: PreTrainedModel,
    folder: Path,
    on_stage: Callable[[str], None] = logger.info,
) -> None:
    """Trains `model` to the end of a stage, from the last checkpoint in `folder` if there is one."""
    stage, seed = recipe.stages[index], recipe.seed + 1000 * index
    recipe = recipe.sized_for(stage)
    accumulation = num_accumulation_steps(stage.tasks, partial_state().num_processes, recipe.micro_batch_size)
    for data in filter(None, (recipe.data_of(stage), stage.held_out)):
        kind.check_data(model, stage, data)
    bundles, held_out = create_bundles(recipe, stage, seed, accumulation), create_held_out(recipe, stage)
    trainer = BundleTrainer(
        model, kind.create_objective(stage, seed), stage, bundles, folder,
        recipe=recipe, seed=seed, accumulation=accumulation, held_out=held_out,
    )  # fmt: skip
    if partial_state().is_main_process:
        on_stage(describe_modules(model))
    kind.add_samples(trainer, recipe, stage, folder)
    trainer.train_stage()
    save_finished(kind, trainer, recipe, folder)


def save_finished(kind: ModelKind, trainer: BundleTrainer, recipe: HydraRecipe, folder: Path) -> None:
    """Writes `final`: the model with merged adapters, and in `final/adapter` the adapters themselves."""
    accelerator, model = trainer.accelerator, trainer.averaged_model
    weights = accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_sharded else None  # by all processes
    if accelerator.is_main_process:
        if trainer.is_sharded:
            model = kind.empty_model(recipe)
            model.load_state_dict(weights)

        def write(final: Path) -> None:
            if has_adapters(model):
                save_adapters(model, final / "adapter")
                merge_adapters(model)
            kind.save(model.eval(), recipe, final)

        write_folder(folder / "final", write)
    accelerator.wait_for_everyone()


def create_bundles(recipe: HydraRecipe, stage: HydraStage, seed: int, accumulation: int = 1) -> Dataset:
    """The bundles of this process. Raises ValueError for a stage without data, and for workers that would read a stream."""
    data = recipe.data_of(stage)
    if data is None:
        raise ValueError(f"{recipe.name} needs data: a source for each of {list(stage.tasks)}.")
    if recipe.num_workers and data.is_streaming:
        raise ValueError(f"num_workers={recipe.num_workers}: a stream is read in order, by one process; use 0.")
    processes = partial_state()
    return data.bundles(
        stage, recipe.sized_for(stage).processor, seed, max_length=recipe.max_length or recipe.config.get_text_config().max_position_embeddings,
        process_index=processes.process_index, num_processes=processes.num_processes, accumulation=accumulation,
    )  # fmt: skip


def create_held_out(recipe: HydraRecipe, stage: HydraStage) -> tuple[dict, ...]:
    """This process's bundles to measure losses on, with no prompt dropped; () without held-out data."""
    if stage.held_out is None:
        return ()
    tasks = dict.fromkeys(stage.tasks, stage.num_held_out)
    measured = replace(stage, tasks=tasks, data=stage.held_out, num_steps=1, drop_prompt=0.0)
    accumulation = num_accumulation_steps(tasks, partial_state().num_processes, recipe.micro_batch_size)
    bundles = create_bundles(replace(recipe, num_workers=0), measured, recipe.seed, accumulation)
    return tuple(bundles[index] for index in range(accumulation))


def create_model(recipe: HydraRecipe) -> HydraForConditionalGeneration:
    """The model that the first stage starts from: `init` or new weights, with the trained tokenizer.

    Raises ValueError if the tokenizer does not fit the rest of the model.
    """
    torch.manual_seed(recipe.seed)  # initial weights
    if recipe.init is not None:
        model = open_model(recipe.init, recipe)
        adopt_config(model, recipe.config)
    else:
        config = deepcopy(recipe.config)  # the model writes to it
        model = HydraForConditionalGeneration._from_config(config, attn_implementation=recipe.attn_implementation)
    if recipe.tokenizer is not None:
        replace_tokenizer(model, recipe)
    return model


def adopt_config(model: HydraForConditionalGeneration, config: HydraConfig) -> None:
    """Gives a trained model what the recipe's `config` has beyond its own: clips, edits that see their source, and tokens at the
    end of the vocabulary, each of which starts as the mean of the old ones."""
    if config.text_config.vocab_size > model.config.text_config.vocab_size:
        model.resize_token_embeddings(config.text_config.vocab_size)
    model.config.video_token_id = config.video_token_id
    model.config.use_source_interaction = config.use_source_interaction


def replace_tokenizer(model: HydraForConditionalGeneration, recipe: HydraRecipe) -> None:
    """Replaces the model's tokenizer with that of the recipe. Raises ValueError if it does not fit."""
    tower = HydraTokModel.from_pretrained(
        recipe.tokenizer, attn_implementation=recipe.attn_implementation, dtype=torch.float32
    )
    for name in ("hidden_size", "patch_size", "latent_channels"):
        ours, theirs = (getattr(config, name) for config in (model.config.vision_config, tower.config))
        if ours != theirs:
            raise ValueError(f"The tokenizer {recipe.tokenizer} has {name}={theirs}, expected {ours}.")
    model.model.vision_tower = tower
    model.config.vision_config = HydraTokConfig.from_dict(tower.config.to_diff_dict())


def open_model(pipeline: str | Path, recipe: HydraRecipe) -> HydraForConditionalGeneration:
    """The model of a pipeline, a folder or Hub id, for training: in fp32, whatever its dtype on disk."""
    return HydraForConditionalGeneration.from_pretrained(
        pipeline,
        subfolder=subfolder_of(pipeline, "model"),
        attn_implementation=recipe.attn_implementation,
        dtype=torch.float32,
    )


def save_compact(pipeline: HydraPipeline, folder: Path) -> None:
    """Saves a pipeline in half the space: weights are bf16 on disk, and fp32 again once opened."""
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if component is not pipeline.model:
            component.save_pretrained(folder / name)
    weights, halves = dict(pipeline.model.state_dict()), {}
    for name, parameter in pipeline.model.named_parameters(
        remove_duplicate=False
    ):  # not the statistics of the latents
        if parameter not in halves:
            halves[parameter] = parameter.detach().to(torch.bfloat16)
        weights[name] = halves[parameter]  # tied weights stay one tensor
    pipeline.model.save_pretrained(folder / "model", state_dict=weights)
