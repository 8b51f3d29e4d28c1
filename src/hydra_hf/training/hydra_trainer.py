"""Trains HYDRA, stage by stage, on `transformers.Trainer`. HYDRA, section 2.2: L = L_NTP + L_FM.

A stage's folder has `final`, a pipeline that opens with `from_pretrained`, once the stage is done. Under torchrun or
`accelerate launch` all processes run this and the main one writes; the folder must be one for all machines.
"""

import json
import logging
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path

import torch
from accelerate.utils import release_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from hydra_hf.files import has_folder, write_folder, write_text
from hydra_hf.modeling import HydraForConditionalGeneration, HydraTokConfig, HydraTokModel
from hydra_hf.modeling.compat import CHECKPOINTING
from hydra_hf.modeling.flow import add_noise, sample_sigma, shift_sigma, velocity_target
from hydra_hf.modeling.grid import Grid, image_grids, noise_tokens, num_tokens, per_token
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .callbacks import LOSSES, EveryStep, LossHistory, SampleGrids, create_pipeline
from .checkpoints import load_state, save_state
from .lora import add_adapters, has_adapters, merge_adapters, save_adapters
from .losses import weighted_sum
from .optimizers import create_average, create_optimizer, shardable
from .processes import num_accumulation_steps, partial_state
from .randomness import grids_per_row, row_noise
from .recipe import HydraRecipe, HydraStage, freeze_unnamed


logger = logging.getLogger(__name__)


class HydraTrainer(Trainer):
    """Bundles of tasks in, named losses out; the trainer owns the noise, the model adds none.

    All randomness of a step comes from the seed and its number, and every state is saved, so a killed and resumed run
    ends with the losses of an unbroken one. A loss is a mean over the tokens of the whole optimizer step, of all
    processes and micro steps, so a run on many processes is the run on one.

    Args:
        bundles: of this process, as the stage's data gives them.
        accumulation: micro steps of one optimizer step, as many as the bundles have.

    Raises:
        ValueError: for several GPUs in one process, or Muon or adapters on sharded weights (FSDP, DeepSpeed).
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(
        self,
        model: HydraForConditionalGeneration,
        stage: HydraStage,
        bundles: Dataset,
        output_dir: Path,
        *,
        recipe: HydraRecipe,
        seed: int,
        accumulation: int = 1,
    ):
        self.stage, self.noise_seed = stage, seed
        self.losses = LossHistory()
        freeze_unnamed(model, stage)
        if stage.lora_rank:
            add_adapters(model, stage, seed)
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=stage.num_steps,
            per_device_train_batch_size=1,  # one bundle
            gradient_accumulation_steps=accumulation,
            dataloader_num_workers=recipe.num_workers,
            bf16=stage.mixed_precision == "bf16",
            use_cpu=not torch.accelerator.is_available(),
            max_grad_norm=stage.max_grad_norm,
            logging_steps=recipe.log_every,
            save_steps=recipe.save_every,
            save_total_limit=2,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # every process runs every task
            ddp_broadcast_buffers=False,  # they never change, and a task's forward must not write what another's reads
            report_to=[],
            seed=seed,
            **{CHECKPOINTING: recipe.gradient_checkpointing},
        )
        if arguments.n_gpu > 1:
            raise ValueError(
                f"{arguments.n_gpu} GPUs are visible to one process; start one for each:"
                f" torchrun --nproc_per_node {arguments.n_gpu} -m hydra_hf.cli train ..., or set CUDA_VISIBLE_DEVICES."
            )
        super().__init__(
            model, arguments, train_dataset=bundles, data_collator=itemgetter(0),  # of a list of one bundle
            callbacks=[EveryStep(self, output_dir)],
        )  # fmt: skip
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.is_sharded and stage.lora_rank:
            raise ValueError(f"{stage.name}: lora_rank={stage.lora_rank} does not go with sharded weights; use DDP.")
        self.ema = create_average(model, stage, self.is_sharded)

    @property
    def averaged_model(self) -> HydraForConditionalGeneration:
        """What the stage gives: the average of the weights, or without one the weights."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module

    def get_train_dataloader(self) -> DataLoader:
        """In order and as they are: a bundle's number is its micro step, and the bundles are this process's own."""
        return DataLoader(
            self.train_dataset, batch_size=1, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = create_optimizer(model or self.model, self.stage)
            self.optimizer = shardable(optimizer, self.stage) if self.is_sharded else optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.stage.learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, *args, **kwargs) -> tuple:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # it is called beside `forward`, so its weights must be gathered for it too
            torch.distributed.fsdp.register_fsdp_forward_method(self.model, "encode_images")
        return prepared

    # Losses

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device) -> tuple[list, dict[str, Tensor]]:
        """The bundles of one optimizer step, and how many tokens have a target in it, on all processes, by loss."""
        bundles = [next(epoch_iterator) for _ in range(num_batches)]
        for bundle in bundles:
            bundle["num_targets"] = {task: self.count_targets(bundle[task]) for task in self.stage.tasks}
        counts = [sum(task[name] for bundle in bundles for task in bundle["num_targets"].values()) for name in LOSSES]
        counts = self.accelerator.reduce(torch.tensor(counts, dtype=torch.float32, device=device), "sum")
        self.losses.count(dict(zip(LOSSES, counts > 0)), sum(sum(bundle["skipped"].values()) for bundle in bundles))
        return bundles, dict(zip(LOSSES, counts.clamp(min=1)))

    def count_targets(self, batch: dict) -> dict[str, int]:
        """How many text and image tokens of a batch have a target; none of a blank one."""
        if not batch["num_samples"]:
            return dict.fromkeys(LOSSES, 0)
        num_drawn = 0
        if "pixel_values" in batch:
            num_drawn = int(batch["image_grid_thw"].prod(dim=1)[batch["is_generated"]].sum())
        return {"language": int((batch["labels"][:, 1:] != -100).sum()), "flow": num_drawn}

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Every task's batch through the model; a loss is a sum over this bundle's tokens, divided by the step's.

        Times the number of processes, since the gradients are averaged over them.
        """
        totals, outputs = {}, {}
        for task in self.stage.tasks:
            outputs[task] = model(**self.prepare_batch(inputs, task))
            for name in LOSSES:
                value = getattr(outputs[task], f"{name}_loss")
                if value is not None:
                    totals[name] = totals.get(name, 0.0) + value * inputs["num_targets"][task][name]
        losses = {name: total / num_items_in_batch[name] for name, total in totals.items()}
        self.losses.add(losses)
        loss = weighted_sum(losses, self.stage.loss_weights) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prepare_batch(self, inputs: dict, task: str) -> dict[str, Tensor]:
        """The task's batch as the model takes it: pixels to latents, noise on what is to be generated."""
        model = self.accelerator.unwrap_model(self.model)
        batch = dict(inputs[task])
        batch.pop("num_samples")
        if not (batch["labels"][:, 1:] != -100).any():
            batch.pop("labels")
            batch["logits_to_keep"] = 1  # none is scored
        if "pixel_values" not in batch:
            return batch
        grids = image_grids(batch["image_grid_thw"])
        with torch.no_grad(), self.accelerator.autocast():
            latents = model.encode_images(batch.pop("pixel_values"), batch["image_grid_thw"]).float()  # packed
        is_generated = batch.pop("is_generated")
        if not is_generated.any():
            return batch | {"latents": latents, "sigma": latents.new_zeros(len(grids))}

        def sample(grids: list[Grid], generator: torch.Generator) -> tuple[Tensor, Tensor]:
            sigma = sample_sigma(len(grids), logit_std=model.config.sigma_logit_std, generator=generator)
            shifts = [model.get_sigma_shift(num_tokens(grid)) for grid in grids]
            sigma = torch.stack([shift_sigma(each, shift) for each, shift in zip(sigma, shifts)])
            return sigma, noise_tokens(grids, latents.shape[1], generator)

        step, rows = int(inputs["step"]), inputs["rows"][task]
        own_grids = grids_per_row(batch["mm_token_type_ids"], grids)
        sigma, noise = row_noise(step, task, rows, own_grids, sample, seed=self.noise_seed)
        sigma = torch.where(is_generated, sigma.to(latents.device), 0)
        noise = noise.to(latents.device)
        return batch | {
            "latents": add_noise(latents, noise, per_token(sigma, grids)),
            "sigma": sigma,
            "is_generated": is_generated,
            "velocity_target": velocity_target(latents, noise)[per_token(is_generated, grids)],
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Named losses, the mean since the last log, and the records that could not be read."""
        if "loss" in logs:
            logs["loss"] = round(logs["loss"], 5)
            logs |= self.losses.collect(self.accelerator)
        super().log(logs, start_time)

    # State in safetensors and JSON; there is no other randomness than the steps' own. Sharded state is accelerate's.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle; nothing reads it
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(Path(output_dir), "optimizer", self.optimizer.optimizer.state_dict())
            save_state(Path(output_dir), "scheduler", {"last_epoch": self.lr_scheduler.last_epoch})
            if self.ema is not None:
                save_state(Path(output_dir), "ema", self.ema.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._load_data_state(Path(checkpoint))
        if self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.optimizer.load_state_dict(load_state(Path(checkpoint), "optimizer"))
        self.lr_scheduler.last_epoch = load_state(Path(checkpoint), "scheduler")["last_epoch"]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the log says
        if self.ema is not None:
            self.ema.load_state_dict(load_state(Path(checkpoint), "ema"))

    def _save_rng_state(self, output_dir: str) -> None:
        """Where this process's streams stand; the whole state is there before `trainer_state.json` says so."""
        self.accelerator.wait_for_everyone()  # the main process has made the folder
        if state := self.train_dataset.state_dict(self.state.global_step):
            write_text(self._data_state_path(Path(output_dir)), json.dumps(state))
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass

    def _load_data_state(self, checkpoint: Path) -> None:
        """Raises ValueError if another number of processes wrote it."""
        path = self._data_state_path(checkpoint)
        if path.exists():
            self.train_dataset.load_state_dict(json.loads(path.read_text()))
        elif others := sorted(found.name for found in checkpoint.glob("data-*-of-*.json")):
            raise ValueError(f"{checkpoint} has the streams' state in {others}, expected {path.name}.")

    def _data_state_path(self, checkpoint: Path) -> Path:
        return checkpoint / f"data-{self.args.process_index}-of-{self.args.world_size}.json"


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose state, written last, can be read; a killed save leaves one that cannot."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s is incomplete and is passed over.", checkpoint)
            continue
        return str(checkpoint)
    return None


def train_hydra(
    recipe: HydraRecipe, output_dir: Path, *, only: str | None = None, on_stage: Callable[[str], None] = logger.info
) -> Path:
    """Runs every stage that is not done yet, or `only` one; the folder of the finished pipeline.

    A stage starts from the last one before it that is done, the first from what `create_model` gives.
    Raises ValueError for a stage that the recipe does not have, or a recipe that cannot be trained.
    """
    if only is not None and only not in (names := [stage.name for stage in recipe.stages]):
        raise ValueError(f"{recipe.name} has no stage {only!r}; its stages are {names}.")
    if recipe.processor is None:
        raise ValueError(
            f"{recipe.name} needs init, the folder that `hydra convert` made, for its weights and tokenizer."
        )
    processes = partial_state()
    done = None
    for index, stage in enumerate(recipe.stages):
        folder = output_dir / stage.name
        with processes.main_process_first():
            is_done = has_folder(folder / "final")
        if not is_done and only in (None, stage.name):
            if processes.is_main_process:
                on_stage(f"{recipe.name}: stage {stage.name}, {stage.num_steps} steps")
                folder.mkdir(parents=True, exist_ok=True)
            train_stage(recipe, index, create_model(recipe) if done is None else open_model(done, recipe), folder)
            release_memory()
            is_done = True
        if is_done:
            done = folder / "final"
        if stage.name == only:
            return done
    compact = output_dir / "final"
    if processes.is_main_process and not has_folder(compact):
        pipeline = create_pipeline(open_model(done, recipe), recipe.processor)
        write_folder(compact, lambda folder: save_compact(pipeline, folder))
    processes.wait_for_everyone()
    return compact


def train_stage(recipe: HydraRecipe, index: int, model: HydraForConditionalGeneration, folder: Path) -> None:
    """Trains `model` to the end of a stage, from the last checkpoint in `folder` if there is one."""
    stage, seed = recipe.stages[index], recipe.seed + 1000 * index
    accumulation = num_accumulation_steps(stage.tasks, partial_state().num_processes, recipe.micro_batch_size)
    bundles = create_bundles(recipe, stage, seed, accumulation)
    trainer = HydraTrainer(model, stage, bundles, folder, recipe=recipe, seed=seed, accumulation=accumulation)
    prompts = list(recipe.sample_prompts or stage.data.sample_prompts(recipe.seed))
    grids = SampleGrids(trainer, recipe.processor, prompts, folder, recipe.sample_every, recipe.seed)
    trainer.add_callback(grids)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    save_finished(trainer, recipe, folder)


def save_finished(trainer: HydraTrainer, recipe: HydraRecipe, folder: Path) -> None:
    """`final`: the pipeline with merged adapters, and beside it the adapters themselves."""
    accelerator, model = trainer.accelerator, trainer.averaged_model
    weights = accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_sharded else None  # all give their part
    if accelerator.is_main_process:
        if trainer.is_sharded:
            model = HydraForConditionalGeneration._from_config(recipe.config)
            model.load_state_dict(weights)

        def write(final: Path) -> None:
            if has_adapters(model):
                save_adapters(model, final / "adapter")
                merge_adapters(model)
            create_pipeline(model.eval(), recipe.processor).save_pretrained(final)

        write_folder(folder / "final", write)
    accelerator.wait_for_everyone()


def create_bundles(recipe: HydraRecipe, stage: HydraStage, seed: int, accumulation: int = 1) -> Dataset:
    """The bundles of this process. ValueError for a stage that has no data."""
    if stage.data is None:
        raise ValueError(f"{recipe.name} needs data: a source for each of {list(stage.tasks)}.")
    if recipe.num_workers and stage.data.is_streaming:
        raise ValueError(f"num_workers={recipe.num_workers}: a stream is read in order, by one process; use 0.")
    processes = partial_state()
    with processes.main_process_first():  # the others find its cache
        return stage.data.bundles(
            stage, recipe.processor, seed, max_length=recipe.config.text_config.max_position_embeddings,
            process_index=processes.process_index, num_processes=processes.num_processes, accumulation=accumulation,
        )  # fmt: skip


def create_model(recipe: HydraRecipe) -> HydraForConditionalGeneration:
    """The model that the first stage starts from: `init` or new weights, with the trained tokenizer.

    Raises ValueError if the tokenizer does not fit the rest of the model.
    """
    torch.manual_seed(recipe.seed)  # first weights
    if recipe.init is not None:
        model = open_model(recipe.init, recipe)
    else:
        attention = recipe.attn_implementation
        model = HydraForConditionalGeneration._from_config(recipe.config, attn_implementation=attention)
    if recipe.tokenizer is not None:
        replace_tokenizer(model, recipe)
    return model


def replace_tokenizer(model: HydraForConditionalGeneration, recipe: HydraRecipe) -> None:
    """Puts the tokenizer of the recipe in the place of the model's own."""
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
    """The model of a pipeline, a folder or Hub id, for training: in fp32 whatever it is stored in."""
    return HydraForConditionalGeneration.from_pretrained(
        pipeline, subfolder="model", attn_implementation=recipe.attn_implementation, dtype=torch.float32
    )


def save_compact(pipeline: HydraPipeline, folder: Path) -> None:
    """A pipeline whose weights take half the space: bf16 on disk, fp32 again once opened."""
    for parameter in pipeline.model.parameters():  # statistics of the latents keep their digits
        parameter.data = parameter.data.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
