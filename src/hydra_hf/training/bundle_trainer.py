"""Trains one stage on bundles of tasks, with `transformers.Trainer`. It depends on no model: the objective defines the losses."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from operator import itemgetter
from pathlib import Path

import torch
from accelerate.utils import load_fsdp_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from hydra_hf.data.packing import count_micro_batches, split_bundle
from hydra_hf.files import saving, write_text
from hydra_hf.modeling.compat import CHECKPOINTING

from .callbacks import EveryStep, LossHistory
from .checkpoints import (
    finish_checkpoint,
    forget_later_rows,
    last_whole_checkpoint,
    load_state,
    remove_old_checkpoints,
    save_state,
    step_of,
)
from .interruption import StopRequest, TrainingInterruptedError
from .objective import Objective
from .optimizers import create_average, create_optimizer, shardable
from .recipe import HydraRecipe, HydraStage
from .sharding import autocast, check_launcher, configure_sharding, launcher_precision, save_launcher


HELD_OUT_STEP = 2**31  # no step of training has the noise of this one


class BundleTrainer(Trainer):
    """Trains on bundles of tasks and logs named losses; the noise comes from the objective, the model adds none.

    All randomness of a step comes from the seed and its number, and every state is saved, so a killed and resumed run
    ends with the losses of an uninterrupted one. A loss is a mean over the targets of a task in the whole optimizer step,
    over all processes and micro steps, so a run on many processes equals the run on one.

    Args:
        bundles: those of this process, from the stage's data.
        accumulation: micro steps of one optimizer step, the same as in the bundles.
        held_out: bundles of this process to measure losses on, which are not trained on.

    Raises:
        ValueError: for several GPUs in one process, or Muon or adapters on sharded weights (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        stage: HydraStage,
        bundles: Dataset,
        output_dir: Path,
        *,
        recipe: HydraRecipe,
        seed: int,
        accumulation: int = 1,
        held_out: tuple[dict, ...] = (),
    ):
        self.objective, self.stage, self.held_out = objective, stage, held_out
        self.micro_batch_tokens = recipe.micro_batch_tokens
        self.losses = LossHistory([f"{task}/{name}" for task, name in product(stage.tasks, objective.losses)])
        self.stop = StopRequest()
        objective.select_parameters(model)
        model._keys_to_ignore_on_save = set(model.all_tied_weights_keys)  # they are in no file, so none is missing
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=stage.num_steps,
            per_device_train_batch_size=1,  # one bundle
            gradient_accumulation_steps=accumulation,
            dataloader_num_workers=recipe.num_workers_of(stage),
            bf16=launcher_precision(stage) == "bf16",
            use_cpu=not torch.accelerator.is_available(),
            max_grad_norm=stage.max_grad_norm,
            logging_steps=recipe.log_every,
            save_steps=recipe.save_every,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # every process runs every task
            ddp_broadcast_buffers=False,  # they never change, and no task's forward may write what another's reads
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
            callbacks=[EveryStep(self, output_dir, recipe.sample_every)],
        )  # fmt: skip
        self.model_accepts_loss_kwargs = (
            True  # its loss is divided by the targets of the whole step, not by the micro steps
        )
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        configure_sharding(self.accelerator, stage, model)
        if self.is_sharded and stage.lora_rank:
            raise ValueError(f"{stage.name}: lora_rank={stage.lora_rank} does not go with sharded weights; use DDP.")
        self.ema = create_average(model, stage, self.is_sharded)

    def train_stage(self) -> None:
        """Trains to the end of the stage, from the last whole checkpoint.

        Raises `TrainingInterruptedError` after SIGTERM or Ctrl-C.
        """
        folder = Path(self.args.output_dir)
        with self.accelerator.main_process_first():
            checkpoint = last_whole_checkpoint(folder)
        if checkpoint is not None:
            check_launcher(self.accelerator, Path(checkpoint))
        if self.args.should_save:
            forget_later_rows(folder / "log.jsonl", 0 if checkpoint is None else step_of(checkpoint))
        with self.stop:
            self.train(resume_from_checkpoint=checkpoint)
        if self.stop.signum:
            raise TrainingInterruptedError(self.stage.name, self.state.global_step, self.stop.signum)

    @property
    def unwrapped_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def averaged_model(self) -> PreTrainedModel:
        """The result of the stage: the average of the weights, or without one the weights themselves."""
        return self.unwrapped_model if self.ema is None else self.ema.module

    def get_train_dataloader(self) -> DataLoader:
        """The bundles in order and unchanged: a bundle's number is its micro step, and the bundles are this process's own."""
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
        if self.is_fsdp_enabled:
            for name in self.objective.methods:
                torch.distributed.fsdp.register_fsdp_forward_method(self.model, name)
        return prepared

    # Losses

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device) -> tuple[list, dict[str, Tensor]]:
        """The bundles of one optimizer step, and its number of targets on all processes, by task and loss."""
        bundles = [next(epoch_iterator) for _ in range(num_batches)]
        for bundle in bundles:
            bundle["num_targets"] = self.count_targets(bundle)
        counts = self.sum_over_processes(
            {key: sum(b["num_targets"][key] for b in bundles) for key in self.losses.names}
        )
        num_skipped = sum(sum(bundle["skipped"].values()) for bundle in bundles)
        self.losses.count({key: count > 0 for key, count in counts.items()}, num_skipped)
        return bundles, {key: count.clamp(min=1) for key, count in counts.items()}

    def count_targets(self, bundle: dict) -> dict[str, int]:
        """The number of targets of this bundle, by task and loss."""
        counts = {task: self.objective.count_targets(self.unwrapped_model, bundle[task]) for task in self.stage.tasks}
        return {f"{task}/{name}": count for task in counts for name, count in counts[task].items()}

    def micro_batches(self, bundle: dict) -> list[dict]:
        """The bundle itself, or its parts of at most `micro_batch_tokens`, the same number on every process."""
        if self.micro_batch_tokens is None:
            return [bundle]
        number = count_micro_batches(bundle, self.stage.tasks, self.micro_batch_tokens)
        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        parts = split_bundle(bundle, self.stage.tasks, int(numbers.max()))
        return [{**part, "num_targets": self.count_targets(part)} for part in parts]

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """Forward and backward of every part; the processes exchange gradients in the last one."""
        *others, last = self.micro_batches(inputs)
        loss = 0.0
        for part in others:
            with self.accumulating(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    @contextmanager
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        """Gradients are added up and not exchanged, as in `Trainer` between its own micro steps."""
        self.accelerator.gradient_state._set_sync_gradients(False)  # read by DeepSpeed, whose backward makes the step
        with self.accelerator.no_sync(model):
            yield
        self.accelerator.gradient_state._set_sync_gradients(True)

    def sum_over_processes(self, values: dict[str, Tensor | float]) -> dict[str, Tensor]:
        """Named numbers, each added up over all processes."""
        device = self.accelerator.device
        total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(total, "sum")))

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Runs every task's batch; a loss is a sum over this bundle's targets, divided by the number in the step.

        It is multiplied by the number of processes, since gradients are averaged over them.
        """
        losses, outputs = {}, {}
        for task in self.stage.tasks:
            outputs[task], task_losses = self.losses_of(model, inputs, task)
            for name, value in task_losses.items():
                key = f"{task}/{name}"
                losses[key] = value * inputs["num_targets"][key] / num_items_in_batch[key]
        self.losses.add(losses)
        loss = sum(self.stage.loss_weight_of(*key.split("/")) * value for key, value in losses.items())
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def losses_of(self, model: nn.Module, inputs: dict, task: str) -> tuple[ModelOutput, dict[str, Tensor]]:
        """What `model` makes of one task's batch, and its losses."""
        with autocast(self.accelerator, self.stage):
            batch = self.objective.prepare(self.unwrapped_model, inputs, task)
            outputs = model(**batch)
            return outputs, self.objective.losses_of(self.unwrapped_model, batch, outputs)

    @torch.no_grad()
    def measure_held_out(self) -> dict[str, float]:
        """The losses of the held-out bundles, with the same noise each time, under the average of the weights if there is one."""
        model = (self.model_wrapped if self.ema is None else self.ema.module).eval()
        sums, counts = dict.fromkeys(self.losses.names, 0.0), dict.fromkeys(self.losses.names, 0)
        bundles = [
            {**bundle, "step": HELD_OUT_STEP, "num_targets": self.count_targets(bundle)} for bundle in self.held_out
        ]
        for part in (part for bundle in bundles for part in self.micro_batches(bundle)):
            inputs, num_targets = self._prepare_inputs(part), part["num_targets"]
            counts = {key: count + num_targets[key] for key, count in counts.items()}
            for task in self.stage.tasks:
                for name, value in self.losses_of(model, inputs, task)[1].items():
                    sums[f"{task}/{name}"] += value.float() * num_targets[f"{task}/{name}"]
        totals, counts = self.sum_over_processes(sums), self.sum_over_processes(counts)
        return {f"held_out/{key}": round((totals[key] / counts[key]).item(), 5) for key in totals if counts[key] > 0}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the means of named losses since the last log, and how many records could not be read."""
        if "loss" in logs:
            logs["loss"] = round(logs["loss"], 5)
            logs |= self.losses.collect(self.accelerator)
        super().log(logs, start_time)

    # State in safetensors and JSON. Randomness has no state, since each step has its own; accelerate saves sharded state.

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Writes a checkpoint, whole or not at all; the previous one is kept. Raises OSError if there is no room for it."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with saving(checkpoint, checkpoint):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_checkpoint(checkpoint)
                remove_old_checkpoints(checkpoint.parent, checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle; nothing reads it
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        (folder / "scheduler.pt").unlink(missing_ok=True)  # the library's, a pickle
        save_state(folder, "scheduler", {"last_epoch": self.lr_scheduler.last_epoch})
        if not self.is_sharded:
            save_state(folder, "optimizer", self.optimizer.optimizer.state_dict())
        if self.ema is not None:
            save_state(folder, "ema", self.ema.state_dict())

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Raises ValueError for weights of another model, or adapters of another rank."""
        try:
            super()._load_from_checkpoint(checkpoint, model)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} does not fit the model of {self.stage.name}: {error}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._load_data_state(Path(checkpoint))
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            load_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, checkpoint)
        elif not self.is_sharded:  # DeepSpeed has loaded its own with the weights
            self.optimizer.optimizer.load_state_dict(load_state(Path(checkpoint), "optimizer"))
        self.lr_scheduler.last_epoch = load_state(Path(checkpoint), "scheduler")["last_epoch"]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the log says
        if self.ema is not None:
            self.ema.load_state_dict(load_state(Path(checkpoint), "ema"))

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes the position of this process's streams, before `trainer_state.json` marks the checkpoint as complete."""
        self.accelerator.wait_for_everyone()  # the main process has made the folder
        if state := self.train_dataset.state_dict(self.state.global_step):
            write_text(self._data_state_path(Path(output_dir)), json.dumps(state))
        if self.args.should_save:
            save_launcher(self.accelerator, Path(output_dir))
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass

    def _load_data_state(self, checkpoint: Path) -> None:
        """Raises ValueError if another number of processes wrote the checkpoint."""
        path = self._data_state_path(checkpoint)
        if path.exists():
            self.train_dataset.load_state_dict(json.loads(path.read_text()))
        elif others := sorted(found.name for found in checkpoint.glob("data-*-of-*.json")):
            raise ValueError(f"{checkpoint} has the streams' state in {others}, expected {path.name}.")

    def _data_state_path(self, checkpoint: Path) -> Path:
        return checkpoint / f"data-{self.args.process_index}-of-{self.args.world_size}.json"
