"""Trains one stage of a vision tower (HYDRA-TOK) on images and clips, with accelerate. HYDRA, section 3.3; HYDRA-X, section 2."""

import json
import logging
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm.auto import tqdm

from hydra_hf.data.images import Batches, HeldOut, ReadAhead
from hydra_hf.evaluation.backbones import PooledFeatures
from hydra_hf.evaluation.reconstruction import score_reconstructions
from hydra_hf.files import write_folder, write_image_grid
from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, HydraTokModel, PixelFlowDecoderConfig
from hydra_hf.modeling.flow import sample_sigma
from hydra_hf.modeling.grid import num_tokens

from .checkpoints import (
    finish_checkpoint,
    forget_later_rows,
    last_whole_checkpoint,
    load_state,
    remove_old_checkpoints,
    save_state,
)
from .discriminator import PatchDiscriminator, adaptive_weight, adversarial_loss, discriminator_loss
from .distillation import check_distill_layers, image_distill_loss, video_distill_loss
from .folds import check_kept_latents, zero_anchor_gradients
from .interruption import StopRequest, TrainingInterruptedError
from .latent_statistics import measure_latents
from .losses import frames_of, reached_parameters, tokenizer_losses, weighted_sum
from .optimizers import MuonAdamW, create_average, create_optimizer, shardable
from .processes import gather_shares, partial_state, share_of, split_batch
from .randomness import row_generator
from .recipe import TokenizerStage, freeze_unnamed
from .sharding import (
    SHARDED,
    autocast,
    check_launcher,
    configure_sharding,
    launcher_precision,
    save_launcher,
)
from .teachers import load_perceptual, load_teacher
from .video_teachers import load_video_teacher


logger = logging.getLogger(__name__)


class TokenizerTrainer:
    """Trains one stage on `batches`, and measures it on `held_out`."""

    def __init__(
        self,
        model: HydraTokForPreTraining,
        stage: TokenizerStage,
        batches: Batches,
        held_out: HeldOut,
        output_dir: Path,
        *,
        seed: int = 0,
        micro_batch_size: int | None = None,
        log_every: int = 50,
        save_every: int = 1000,
        sample_every: int = 1000,
    ):
        self.stage, self.output_dir, self.seed = stage, output_dir, seed
        self.batches, self.held_out = batches, held_out
        self.log_every, self.save_every, self.sample_every = log_every, save_every, sample_every
        state = partial_state()
        self.micro, self.accumulation = split_batch(stage.batch_size, state.num_processes, micro_batch_size)
        if state.distributed_type != DistributedType.FSDP:  # only the first state reads FSDP's settings
            AcceleratorState._reset_state()  # otherwise every stage would keep the precision of the first
        self.accelerator = Accelerator(
            mixed_precision=launcher_precision(stage),
            gradient_accumulation_steps=self.accumulation,
            cpu=not torch.accelerator.is_available(),
        )
        if stage.clip_share and self.micro % stage.images_per_clip:
            raise ValueError(
                f"{stage.name}: {self.micro} images of a process at once must be a multiple of"
                f" images_per_clip={stage.images_per_clip}, since clips take their place."
            )
        stride = self.micro * state.num_processes
        starts = range(self.micro * state.process_index, stage.batch_size, stride)
        self.rows = [range(start, start + self.micro) for start in starts]  # of this process, by micro step
        self.read = ReadAhead(batches, self.rows)
        self.step, self.stop = 0, StopRequest()
        self.prepare(model.to(self.accelerator.device))
        self.prepare_judges()

    def prepare(self, model: HydraTokForPreTraining) -> None:
        """Sets up the model, its optimizer and its average for the launcher."""
        check_distill_layers(self.stage, model.config.num_hidden_layers)
        freeze_unnamed(model, self.stage)
        self.freeze_unreached(model)
        if self.stage.keeps_image_latents:
            check_kept_latents(model.model, self.stage)
        self.config: HydraTokConfig = model.config
        optimizer = create_optimizer(model, self.stage)
        self.is_sharded = self.accelerator.distributed_type in SHARDED
        if self.is_sharded:
            optimizer = self.check_sharding(optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.stage.learning_rate_factor)
        self.ema = create_average(model, self.stage, self.is_sharded)
        configure_sharding(self.accelerator, self.stage, model)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.micro
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def freeze_unreached(self, model: HydraTokForPreTraining) -> None:
        """Freezes modules that the stage trains but no loss reaches: DDP expects a gradient for every trained parameter."""
        reached = reached_parameters(model, self.stage)
        unreached = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in reached
        }
        for parameter in unreached.values():
            parameter.requires_grad_(False)
        if unreached and self.accelerator.is_main_process:
            modules = sorted({name.removeprefix("model.").rpartition(".")[0] for name in unreached})
            logger.warning("%s: no loss reaches %s, which stay as they are.", self.stage.name, modules)

    def check_sharding(self, optimizer: MuonAdamW) -> torch.optim.AdamW:
        """The optimizer that FSDP and DeepSpeed can shard. Raises ValueError for settings that need whole matrices."""
        for name in ("adaptive_adversarial_weight", "keeps_image_latents"):
            if getattr(self.stage, name):
                raise ValueError(
                    f"{self.stage.name}: {name}=True, expected False: it needs a whole matrix, which FSDP and DeepSpeed do"
                    " not keep."
                )
        return shardable(optimizer, self.stage)

    def prepare_judges(self) -> None:
        """Loads the teacher, perceptual distance and discriminator that the losses need; none is part of the model."""
        stage, weights, device = self.stage, self.stage.loss_weights, self.accelerator.device
        if weights.distill > 0:
            self.teacher = load_teacher(stage.teacher, stage.teacher_weights).to(device)
        if weights.video_distill > 0:
            self.video_teacher = load_video_teacher(stage.video_teacher, self.config).to(device)
        if weights.perceptual > 0:
            self.perceptual = load_perceptual(stage.perceptual_backbone, stage.perceptual_weights).to(device)
        self.discriminator = None
        if weights.discriminator > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.discriminator = PatchDiscriminator().to(device)
            # It is small, so every process holds all of it, and its gradients are averaged by hand under any launcher.
            self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), betas=(0.5, 0.9))
        self.pooled_features = None
        if stage.frechet_backbone is not None:
            self.pooled_features = PooledFeatures(stage.frechet_backbone, stage.frechet_weights).to(device)

    def train(self) -> HydraTokModel:
        """Trains to the end of the stage, from the last whole checkpoint if there is one; returns the averaged model.

        Raises `TrainingInterruptedError`, once all is saved, after SIGTERM or Ctrl-C.
        """
        with self.accelerator.main_process_first():
            checkpoint = last_whole_checkpoint(self.output_dir)
        if checkpoint is not None:
            self.load_checkpoint(Path(checkpoint))
        if self.accelerator.is_main_process:
            forget_later_rows(self.output_dir / "log.jsonl", self.step)
        with self.stop:
            self.train_steps()
        return self.averaged_model()

    def train_steps(self) -> None:
        """Trains to the end of the stage, or of the step in which the run is asked to stop."""
        history: dict[str, list[Tensor]] = defaultdict(list)  # since the last log
        with tqdm(
            total=self.stage.num_steps, initial=self.step, desc=self.stage.name, mininterval=5,
            disable=not self.accelerator.is_main_process,
        ) as progress:  # fmt: skip  # closed before an error is shown
            while self.step < self.stage.num_steps:
                for name, value in self.train_step().items():
                    history[name].append(value)
                self.step += 1
                progress.update()
                is_last, record = self.step == self.stage.num_steps, {}
                signum = self.stop.agreed(self.accelerator)
                if self.step % self.log_every == 0:
                    record = self.average(history)
                    progress.set_postfix({name: f"{value:.4f}" for name, value in record.items()})
                    history.clear()
                if self.step % self.sample_every == 0 or is_last:
                    record |= self.measure()
                if record:
                    self.write_log(record)
                if self.step % self.save_every == 0 or is_last or signum:
                    self.save_checkpoint()
                if signum:
                    raise TrainingInterruptedError(self.stage.name, self.step, signum)

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns this process's mean of each loss by name, and their weighted sum as `loss`.

        The names of a step of clips begin with "clip_".
        """
        self.model.train()
        totals: dict[str, Tensor] = defaultdict(float)
        for index, rows in enumerate(self.rows):
            pixel_values = self.read(self.step, index).to(self.accelerator.device)
            with self.accelerator.accumulate(self.model):
                losses = self.micro_step(pixel_values, rows)
            for name, value in losses.items():
                name = f"clip_{name}" if pixel_values.ndim == 5 else name
                totals[name] = totals[name] + value.detach() / self.accumulation
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        return dict(totals)

    def micro_step(self, pixel_values: Tensor, rows: range) -> dict[str, Tensor]:
        """Forward and backward of some rows; the optimizers step at the end of an accumulation."""
        noise, layers = self.sample_noise(pixel_values, rows), self.stage.compared_layers
        with autocast(self.accelerator, self.stage):
            outputs = self.model(pixel_values, **noise, distill_layers=layers)
        losses = self.tokenizer_losses(outputs, pixel_values)
        loss = self.add_adversarial(losses, outputs.clean_pixel_values)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            if self.stage.keeps_image_latents:
                zero_anchor_gradients(self.accelerator.unwrap_model(self.model).model)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.accelerator.clip_grad_norm_(trained, self.stage.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.discriminator is not None:
            copies = frames_of(outputs.clean_pixel_values.detach())
            losses["discriminator"] = self.discriminator_step(frames_of(pixel_values), copies)
        return {"loss": loss, **losses}

    def tokenizer_losses(self, outputs, pixel_values: Tensor) -> dict[str, Tensor]:
        """Every loss but the adversarial one."""
        weights = self.stage.loss_weights
        losses = tokenizer_losses(outputs, pixel_values, weights)
        model = self.accelerator.unwrap_model(self.model).model
        with autocast(self.accelerator, self.stage):
            if weights.distill > 0:
                losses["distill"] = image_distill_loss(model, self.teacher, outputs, pixel_values, self.stage)
            if weights.video_distill > 0:
                losses["video_distill"] = video_distill_loss(model, self.video_teacher, outputs, pixel_values)
        if weights.perceptual > 0:
            losses["perceptual"] = self.perceptual(frames_of(outputs.clean_pixel_values), frames_of(pixel_values))
        return losses

    def add_adversarial(self, losses: dict[str, Tensor], clean_pixel_values: Tensor) -> Tensor:
        """The weighted sum to minimise; adds `adversarial` to the losses from `discriminator_start` on."""
        weights = self.stage.loss_weights
        loss = weighted_sum(losses, weights)
        if weights.adversarial == 0 or self.step < self.stage.discriminator_start:
            return loss
        self.discriminator.requires_grad_(False)
        losses["adversarial"] = adversarial_loss(self.discriminator(frames_of(clean_pixel_values)))
        self.discriminator.requires_grad_(True)
        scale = 1.0
        if self.stage.adaptive_adversarial_weight:
            last_layer = self.accelerator.unwrap_model(self.model).model.pixel_decoder.out_proj.weight
            gradients = [
                torch.autograd.grad(x, last_layer, retain_graph=True)[0] for x in (loss, losses["adversarial"])
            ]
            scale = adaptive_weight(*(self.accelerator.reduce(gradient, "mean") for gradient in gradients))
        return loss + weights.adversarial * scale * losses["adversarial"]

    def discriminator_step(self, pixel_values: Tensor, clean_pixel_values: Tensor) -> Tensor:
        """Trains the discriminator on images and their reconstructions; returns its loss."""
        loss = discriminator_loss(self.discriminator(pixel_values), self.discriminator(clean_pixel_values))
        (self.stage.loss_weights.discriminator * loss / self.accumulation).backward()
        if self.accelerator.sync_gradients:
            for parameter in self.discriminator.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            factor = self.stage.learning_rate_factor(self.step)
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = self.stage.discriminator_learning_rate * factor
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad()
        return loss

    def sample_noise(self, pixel_values: Tensor, rows: range) -> dict[str, Tensor]:
        """The posterior's noise for these rows of a step, and for a flow decoder the noise of its pixels and the noise levels.

        A clip has that of the first row in whose place it is.
        """
        grid = self.accelerator.unwrap_model(self.model).model.get_grid(pixel_values)
        latent_shape = (num_tokens(grid), self.config.latent_channels)
        patch = self.config.num_channels * self.config.patch_size**2
        sampled = defaultdict(list)
        for row in rows[:: len(rows) // len(pixel_values)]:
            generator = row_generator(self.seed, self.step, row)
            sampled["latent_noise"].append(torch.randn(latent_shape, generator=generator))
            if isinstance(self.config.decoder_config, PixelFlowDecoderConfig):
                sampled["pixel_noise"].append(torch.randn(num_tokens(grid), patch, generator=generator))
                sigma = sample_sigma(1, generator=generator)[0]
                is_one_step = torch.rand((), generator=generator) < self.stage.one_step_prob
                sampled["sigma"].append(torch.where(is_one_step, torch.ones_like(sigma), sigma))
        return {name: torch.stack(values).to(pixel_values.device) for name, values in sampled.items()}

    # Logs and samples

    def average(self, history: dict[str, list[Tensor]]) -> dict[str, float]:
        """The mean of each loss over steps and processes, the factor on the learning rates, and the records skipped since the
        start."""
        means = torch.stack([torch.stack(values).float().mean() for values in history.values()])
        means = self.accelerator.reduce(means, "mean").tolist()
        skipped = torch.tensor(sum(self.batches.num_skipped.values()), device=self.accelerator.device)
        skipped = int(self.accelerator.reduce(skipped, "sum"))
        record = dict(zip(history, means)) | {"learning_rate_factor": self.stage.learning_rate_factor(self.step)}
        return {**record, "skipped": skipped} if skipped else record

    def write_log(self, record: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with open(self.output_dir / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, **record}) + "\n")

    def measure(self) -> dict[str, float]:
        """Scores of the held-out images and, with names that begin with "clip_", of the frames of clips; writes samples."""
        model, stage = self.averaged_model().eval(), self.stage
        scores = self.measure_kind(model, self.held_out.images, stage.num_held_out, self.micro)
        self.write_samples(model, self.held_out.images, min(16, stage.num_held_out), "samples")
        if self.held_out.clips is not None:
            number, micro = stage.num_held_out_clips, max(1, self.micro // stage.images_per_clip)
            clip_scores = self.measure_kind(model, self.held_out.clips, number, micro)
            scores |= {f"clip_{name}": value for name, value in clip_scores.items()}
            self.write_samples(model, self.held_out.clips, min(4, number), "clips")
        return scores

    def measure_kind(self, model: HydraTokModel, batches: Batches, number: int, micro: int) -> dict[str, float]:
        """Scores of `number` held-out images or clips; every process reconstructs its share, `micro` at once."""
        rows = self.share(number)
        parts = (range(start, min(start + micro, rows.stop)) for start in rows[::micro])

        def gather(values: Tensor) -> Tensor:
            """All frames, from those of this process."""
            return gather_shares(self.accelerator, values.unflatten(0, (len(rows), -1)), number).flatten(0, 1)

        pairs = (map(frames_of, self.reconstruct(model, batches, part)) for part in parts)
        return score_reconstructions(pairs, self.pooled_features, gather)

    def write_samples(self, model: HydraTokModel, batches: Batches, number: int, name: str) -> None:
        """Writes held-out images above their reconstructions, eight in a row; or each clip, a row of frames, above its own."""
        pair = self.reconstruct(model, batches, self.share(number))
        pair = [gather_shares(self.accelerator, part, number) for part in pair]
        if self.accelerator.is_main_process:
            is_clip = pair[0].ndim == 5
            pixels = frames_of(torch.stack(pair, dim=1).flatten(0, 1)) if is_clip else torch.cat(pair)
            num_columns = pair[0].shape[2] if is_clip else 8
            write_image_grid(self.output_dir / f"{name}-{self.step:06d}.png", pixels, num_columns=num_columns)

    def share(self, number: int) -> range:
        return share_of(number, self.accelerator.process_index, self.accelerator.num_processes)

    @torch.no_grad()
    def reconstruct(self, model: HydraTokModel, batches: Batches, rows: range) -> tuple[Tensor, Tensor]:
        """Held-out images (len(rows), 3, H, W), or clips (len(rows), 3, T, H, W), in [-1, 1], and their reconstructions."""
        pixel_values = batches(0, rows).to(self.accelerator.device)
        shape = pixel_values.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=row_generator(self.seed, 0, row)) for row in rows])
        with autocast(self.accelerator, self.stage):
            decoded = model.decode(model.encode(pixel_values).latent, noise=noise.to(pixel_values.device)).sample
        return pixel_values, decoded.float()

    def measure_latents(self, model: HydraTokModel) -> tuple[Tensor, Tensor]:
        """Statistics (C,) of the latents of 64 batches that follow those of the stage; every process encodes its share."""
        first = self.stage.num_steps + 2
        batches = (self.batches(step, rows) for step in range(first, first + 64) for rows in self.rows)

        def add_up(sums: Tensor) -> Tensor:
            return self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()

        return measure_latents(model, batches, add_up)

    def averaged_model(self) -> HydraTokModel:
        """The model with averaged weights; if weights are sharded, a complete copy of them on every process, not averaged."""
        if self.ema is not None:
            return self.ema.module.model
        if not self.is_sharded:
            return self.accelerator.unwrap_model(self.model).model
        whole = HydraTokForPreTraining._from_config(self.config, video_teacher_size=self.stage.decompressed_size)
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:  # FSDP gives the others nothing
            whole.load_state_dict(weights)
        for value in whole.to(self.accelerator.device).state_dict().values():
            torch.distributed.broadcast(value, src=0)
        return whole.model

    # State in safetensors and JSON, written by the main process; accelerate saves shards

    def state(self) -> dict:
        """The state that a resumed run needs and that is not sharded, by the name of its file."""
        state = {}
        if not self.is_sharded:
            state = {"model": self.accelerator.unwrap_model(self.model), "optimizer": self.optimizer.optimizer}
        if self.ema is not None:
            state["ema"] = self.ema
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer}
        return state

    def save_checkpoint(self) -> None:
        """Writes a checkpoint on the main process. Shards are written first, so that a checkpoint never lacks its shards."""

        def write(folder: Path) -> None:
            for name, part in self.state().items():
                save_state(folder, name, {"value": part.state_dict()})
            save_state(folder, "step", {"value": self.step})
            save_state(folder, "scheduler", {"value": {"last_epoch": self.scheduler.last_epoch}})
            save_launcher(self.accelerator, folder)
            finish_checkpoint(folder)

        if self.is_sharded:
            shards = self.output_dir / f"shards-{self.step}"
            self.accelerator.save_state(str(shards))
            # A pickle; the randomness of a step comes from the seed and its number.
            (shards / f"random_states_{self.accelerator.process_index}.pkl").unlink()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoint = self.output_dir / f"checkpoint-{self.step}"
            write_folder(checkpoint, write)
            remove_old_checkpoints(self.output_dir, checkpoint)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self, folder: Path) -> None:
        """Restores the state in a checkpoint. Raises ValueError for one of another launcher."""
        check_launcher(self.accelerator, folder)
        for name, part in self.state().items():
            part.load_state_dict(load_state(folder, name)["value"])
        self.step = load_state(folder, "step")["value"]
        if self.is_sharded:
            self.accelerator.load_state(str(self.output_dir / f"shards-{self.step}"))
        self.scheduler.last_epoch = load_state(folder, "scheduler")["value"]["last_epoch"]
        logger.info("Resumed %s at step %d.", self.stage.name, self.step)
