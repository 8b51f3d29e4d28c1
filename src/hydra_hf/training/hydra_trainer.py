"""Trains HYDRA, stage by stage, on `transformers.Trainer`. HYDRA, section 2.2: L = L_NTP + L_FM."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hydra_hf.data.collate import collate
from hydra_hf.data.toy_language import ToyLanguage
from hydra_hf.data.toy_world import ToyWorld
from hydra_hf.evaluation.pictures import save_grid
from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor, HydraTokModel
from hydra_hf.modeling.flow import add_noise, sample_sigma, velocity_target
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .checkpoints import has_folder, load_state, save_state, write_folder
from .losses import weighted_sum
from .optimizers import create_average, create_optimizer
from .recipe import HydraRecipe, HydraStage, freeze_unnamed
from .tokenizer_trainer import step_generator


logger = logging.getLogger(__name__)


class ToyBundles(Dataset):
    """Bundle `step` of a stage: one collated batch for each task, the same whenever it is asked for."""

    def __init__(self, language: ToyLanguage, processor: HydraProcessor, stage: HydraStage, seed: int):
        self.language, self.processor, self.stage, self.seed = language, processor, stage, seed

    def __len__(self) -> int:
        return self.stage.num_steps

    def __getitem__(self, step: int) -> dict:
        generator = step_generator(self.seed, step)
        bundle = {task: collate(self.samples(task, generator), self.processor) for task in self.stage.tasks}
        return {**bundle, "step": step}

    def samples(self, task: str, generator: torch.Generator) -> list:
        stage, count = self.stage, self.stage.tasks[task]
        if task == "generate":
            return self.language.generate_samples(
                count, generator, max_objects=stage.max_objects, drop_prompt=stage.drop_prompt
            )
        if task == "understand":
            return self.language.understand_samples(
                count,
                generator,
                stage.questions_per_image,
                max_objects=stage.max_objects,
                relation_weight=stage.relation_weight,
            )
        raise ValueError(f"{task=} of stage {stage.name!r} is not one that the toy world has: generate, understand.")


class HydraTrainer(Trainer):
    """Bundles of tasks in, named losses out; the trainer owns the noise, the model adds none.

    All randomness of a step comes from the seed and its number, and every state is saved, so a killed and resumed run
    ends with the losses of an unbroken one.
    """

    loss_is_scaled_for_ga = False  # our losses are means of one bundle

    def __init__(self, model: HydraForConditionalGeneration, stage: HydraStage, bundles: Dataset, output_dir: Path, *,
                 seed: int, log_every: int, save_every: int, callbacks: tuple = ()):  # fmt: skip
        self.stage, self.noise_seed = stage, seed
        self.loss_history: dict[str, list[float]] = defaultdict(list)  # since the last log
        freeze_unnamed(model, stage)
        self.ema = create_average(model, stage.ema_decay)
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=stage.num_steps,
            per_device_train_batch_size=1,  # one bundle
            bf16=stage.mixed_precision == "bf16",
            use_cpu=not torch.accelerator.is_available(),
            max_grad_norm=stage.max_grad_norm,
            logging_steps=log_every,
            save_steps=save_every,
            save_total_limit=2,
            remove_unused_columns=False,
            report_to=[],
            seed=seed,
        )
        super().__init__(
            model, arguments, train_dataset=bundles, data_collator=lambda bundles: bundles[0],
            callbacks=[_EveryStep(self, output_dir), *callbacks],
        )  # fmt: skip

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # a bundle's number is its step

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.model, self.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.stage.learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Every task's batch through the model; each loss is the mean over the tokens of all tasks that have it."""
        generator = step_generator(self.noise_seed, int(inputs["step"]) + (1 << 31))
        totals, counts, outputs = defaultdict(float), defaultdict(int), {}
        for task in self.stage.tasks:
            batch, num_labels, num_drawn = self.prepare_batch(inputs[task], generator)
            outputs[task] = model(**batch)
            for name, count in (("language", num_labels), ("flow", num_drawn)):
                value = getattr(outputs[task], f"{name}_loss")
                if value is not None:
                    totals[name], counts[name] = totals[name] + value * count, counts[name] + count
        losses = {name: totals[name] / counts[name] for name in totals}
        loss = weighted_sum(losses, self.stage.loss_weights)
        for name, value in {"loss": loss, **losses}.items():
            self.loss_history[name].append(value.item())
        return (loss, outputs) if return_outputs else loss

    def prepare_batch(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[dict, int, int]:
        """Pixels to latents, noise on what is to be generated; and how many text and image tokens have a target."""
        model = self.accelerator.unwrap_model(self.model)
        batch = dict(batch)
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        if not num_labels:
            batch.pop("labels")
            batch["logits_to_keep"] = 1  # none is scored
        if "pixel_values" not in batch:
            return batch, num_labels, 0
        with torch.no_grad(), self.accelerator.autocast():
            latents = model.encode_images(batch.pop("pixel_values")).float()
        is_generated = batch.pop("is_generated")
        num_tokens = latents[0, 0].numel()
        shift, config = model.get_sigma_shift(num_tokens), model.config
        sigma = sample_sigma(len(latents), shift=shift, logit_std=config.sigma_logit_std, generator=generator)
        sigma = torch.where(is_generated, sigma.to(latents.device), 0)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        batch |= {"latents": add_noise(latents, noise, sigma), "sigma": sigma}
        if is_generated.any():
            batch["is_generated"] = is_generated
            batch["velocity_target"] = velocity_target(latents, noise)[is_generated]
        return batch, num_labels, int(is_generated.sum()) * num_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Named losses, the mean since the last log."""
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 5) for name, values in self.loss_history.items()}
            self.loss_history.clear()
        super().log(logs, start_time)

    # State in safetensors and JSON; there is no other randomness than the steps' own.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle; nothing reads it

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir), "optimizer", self.optimizer.optimizer.state_dict())
        save_state(Path(output_dir), "scheduler", {"last_epoch": self.lr_scheduler.last_epoch})
        save_state(Path(output_dir), "ema", self.ema.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.optimizer.optimizer.load_state_dict(load_state(Path(checkpoint), "optimizer"))
        self.lr_scheduler.last_epoch = load_state(Path(checkpoint), "scheduler")["last_epoch"]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the log says
        self.ema.load_state_dict(load_state(Path(checkpoint), "ema"))

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass


class _EveryStep(TrainerCallback):
    """Averages the weights and writes the log."""

    def __init__(self, trainer: HydraTrainer, output_dir: Path):
        self.trainer, self.path = trainer, output_dir / "log.jsonl"

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.ema.update_parameters(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class SampleGrids(TrainerCallback):
    """Draws held-out prompts with the averaged weights, as a PNG."""

    def __init__(
        self,
        ema: AveragedModel,
        processor: HydraProcessor,
        language: ToyLanguage,
        output_dir: Path,
        every: int,
        seed: int,
    ):
        self.ema, self.processor, self.output_dir, self.every, self.seed = ema, processor, output_dir, every, seed
        self.prompts, _ = language.sample_prompts(24, step_generator(seed, 0), split="test")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every and state.global_step != args.max_steps:
            return
        pipeline = create_pipeline(self.ema.module.eval(), self.processor)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            [prompt.text for prompt in self.prompts], generator=step_generator(self.seed, 1), output_type="pt"
        ).images
        save_grid(images * 2 - 1, self.output_dir / f"samples-{state.global_step:06d}.png", num_columns=8)
        (self.output_dir / "samples.txt").write_text("\n".join(prompt.text for prompt in self.prompts) + "\n")


def create_pipeline(model: HydraForConditionalGeneration, processor: HydraProcessor) -> HydraPipeline:
    """The pipeline that the tiny checkpoint is shipped as."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return HydraPipeline(
        model=model, processor=processor, scheduler=FlowMatchEulerDiscreteScheduler(),
        default_num_inference_steps=24, default_guidance_scale=2.0,
    )  # fmt: skip


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


def create_model(recipe: HydraRecipe) -> HydraForConditionalGeneration:
    """The model that the first stage starts from: a trained tokenizer, everything else new."""
    torch.manual_seed(recipe.seed)  # first weights
    attention = recipe.attn_implementation
    model = HydraForConditionalGeneration._from_config(recipe.config, attn_implementation=attention)
    model.model.vision_tower = HydraTokModel.from_pretrained(recipe.tokenizer, attn_implementation=attention)
    return model


def train_hydra(recipe: HydraRecipe, output_dir: Path, *, on_stage: Callable[[str], None] = logger.info) -> Path:
    """Runs every stage that is not done yet; the folder of the finished pipeline."""
    language, processor = ToyLanguage(ToyWorld(recipe.difficulty)), recipe.processor
    model = create_model(recipe)
    for index, stage in enumerate(recipe.stages):
        folder, seed = output_dir / stage.name, recipe.seed + 1000 * index
        final = folder / "final"
        if not has_folder(final):
            on_stage(f"{recipe.name}: stage {stage.name}, {stage.num_steps} steps")
            folder.mkdir(parents=True, exist_ok=True)
            bundles = ToyBundles(language, processor, stage, seed)
            trainer = HydraTrainer(
                model, stage, bundles, folder, seed=seed, log_every=recipe.log_every, save_every=recipe.save_every
            )
            trainer.add_callback(
                SampleGrids(trainer.ema, processor, language, folder, recipe.sample_every, recipe.seed)
            )
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
            pipeline = create_pipeline(trainer.ema.module.eval(), processor)
            write_folder(final, pipeline.save_pretrained)
        model = HydraForConditionalGeneration.from_pretrained(
            final / "model", attn_implementation=recipe.attn_implementation
        )
    compact = output_dir / "final"
    if not has_folder(compact):
        write_folder(compact, lambda folder: save_compact(create_pipeline(model, processor), folder))
    return compact


def save_compact(pipeline: HydraPipeline, folder: Path) -> None:
    """A pipeline whose weights take half the space: bf16 on disk, fp32 again once opened."""
    for parameter in pipeline.model.parameters():  # statistics of the latents keep their digits
        parameter.data = parameter.data.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
