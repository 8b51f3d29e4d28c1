"""Trains HYDRA-TOK, stage by stage, on accelerate. HYDRA, section 3.3."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from hydra_hf.data.toy_world import ToyWorld
from hydra_hf.evaluation.pictures import save_grid
from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, HydraTokModel, PixelFlowDecoderConfig
from hydra_hf.modeling.flow import sample_sigma
from hydra_hf.modeling.layers import latents_to_tokens

from .checkpoints import has_folder, load_state, save_state, write_folder
from .losses import tokenizer_losses, weighted_sum
from .optimizers import create_average, create_optimizer
from .recipe import Recipe, TokenizerStage, freeze_unnamed


logger = logging.getLogger(__name__)


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step, so that a resumed run sees what the unbroken one saw."""
    return torch.Generator().manual_seed((seed << 32) + step)


def toy_images(world: ToyWorld, num_images: int, generator: torch.Generator) -> Tensor:
    """A batch (B, 3, H, W) of scenes: three fifths as they look, one fifth depth maps, one fifth segmentations."""
    num_maps = num_images // 5
    scenes = world.sample_scenes(num_images, generator)
    depth, segments = world.render_depth(scenes[:num_maps]), world.render_segmentation(scenes[num_maps : 2 * num_maps])
    return torch.cat([depth, segments, world.render(scenes[2 * num_maps :])])


class TokenizerTrainer:
    """One stage. `batches(step)` gives the pixels of a step, whatever happened before."""

    def __init__(
        self,
        model: HydraTokForPreTraining,
        stage: TokenizerStage,
        batches: Callable[[int], Tensor],
        output_dir: Path,
        *,
        seed: int = 0,
        log_every: int = 50,
        save_every: int = 1000,
        sample_every: int = 1000,
    ):
        self.stage, self.batches, self.output_dir, self.seed = stage, batches, output_dir, seed
        self.log_every, self.save_every, self.sample_every = log_every, save_every, sample_every
        self.accelerator = Accelerator(mixed_precision=stage.mixed_precision)
        freeze_unnamed(model, stage)
        optimizer = create_optimizer(model, stage)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.learning_rate_factor)
        self.ema = create_average(model, stage.ema_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = scheduler
        self.step = 0

    def train(self) -> HydraTokModel:
        """Trains to the end of the stage, from the last checkpoint if there is one; gives the averaged model."""
        if has_folder(self.output_dir / "checkpoint"):
            self.load_checkpoint()
        history: dict[str, list[float]] = defaultdict(list)  # since the last log
        progress = tqdm(total=self.stage.num_steps, initial=self.step, desc=self.stage.name, mininterval=5)
        while self.step < self.stage.num_steps:
            losses = self.train_step()
            self.step += 1
            progress.update()
            for name, value in losses.items():
                history[name].append(value.item())
            if self.step % self.log_every == 0:
                self.log(progress, {name: sum(values) / len(values) for name, values in history.items()})
                history.clear()
            if self.step % self.sample_every == 0 or self.step == self.stage.num_steps:
                self.save_samples()
            if self.step % self.save_every == 0 or self.step == self.stage.num_steps:
                self.save_checkpoint()
        return self.ema.module.model

    def train_step(self) -> dict[str, Tensor]:
        """One step; the losses by name, and their weighted sum as `loss`."""
        generator = step_generator(self.seed, self.step)
        pixel_values = self.batches(self.step).to(self.accelerator.device)
        self.model.train()
        with self.accelerator.autocast():
            outputs = self.model(pixel_values, **self.draw_noise(pixel_values, generator))
        losses = tokenizer_losses(outputs, pixel_values)
        loss = weighted_sum(losses, self.stage.loss_weights)
        self.accelerator.backward(loss)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.accelerator.clip_grad_norm_(trained, self.stage.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def draw_noise(self, pixel_values: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The posterior's noise, and for a flow decoder that of the pixels with its levels."""
        config: HydraTokConfig = self.accelerator.unwrap_model(self.model).config
        batch_size, device = len(pixel_values), pixel_values.device
        num_tokens = pixel_values[0, 0].numel() // config.patch_size**2
        noise = {"latent_noise": torch.randn(batch_size, num_tokens, config.latent_channels, generator=generator)}
        if isinstance(config.decoder_config, PixelFlowDecoderConfig):
            patch = config.num_channels * config.patch_size**2
            noise["pixel_noise"] = torch.randn(batch_size, num_tokens, patch, generator=generator)
            sigma = sample_sigma(batch_size, generator=generator)
            one_step = torch.rand(batch_size, generator=generator) < self.stage.one_step_prob
            noise["sigma"] = torch.where(one_step, torch.ones_like(sigma), sigma)
        return {name: value.to(device) for name, value in noise.items()}

    def log(self, progress: tqdm, losses: dict[str, float]) -> None:
        progress.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
        record = {"step": self.step, **losses, "learning_rate_factor": self.stage.learning_rate_factor(self.step)}
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with open(self.output_dir / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def save_samples(self) -> None:
        """A grid of pictures over their reconstructions, from a step that training never reaches."""
        pixel_values = self.batches(self.stage.num_steps + 1)[-16:]
        model = self.ema.module.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            latents = model.encode(pixel_values).latent
            decoded = model.decode(latents, generator=step_generator(self.seed, 0)).sample
        save_grid(torch.cat([pixel_values, decoded]), self.output_dir / f"samples-{self.step:06d}.png", num_columns=8)

    def save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            state = {
                "step": self.step,
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scheduler": {"last_epoch": self.scheduler.last_epoch},
            }
            for name, value in state.items():
                save_state(folder, name, {"value": value})

        write_folder(self.output_dir / "checkpoint", write)

    def load_checkpoint(self) -> None:
        folder = self.output_dir / "checkpoint"
        state = {
            name: load_state(folder, name)["value"] for name in ("step", "model", "ema", "optimizer", "scheduler")
        }
        self.step = state["step"]
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        logger.info("Resumed %s at step %d.", self.stage.name, self.step)


@torch.no_grad()
def measure_latents(
    model: HydraTokModel, batches: Iterator[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of sampled latents, in fp64; a dead channel then keeps its unit noise."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for pixel_values in batches:
        latents = latents_to_tokens(model.encode(pixel_values).latent_dist.sample(generator)).flatten(0, 1).double()
        count, total, squares = count + len(latents), total + latents.sum(0), squares + (latents**2).sum(0)
    mean = total / count
    std = (squares / count - mean**2).sqrt()
    # encode() normalises by the statistics in force; these are what it would have to normalise by.
    old_mean, old_std = model.bottleneck.latents_mean, model.bottleneck.latents_std
    return (mean * old_std + old_mean).float(), (std * old_std).float()


def create_stage_model(
    recipe: Recipe, stage: TokenizerStage, previous: HydraTokModel | None
) -> HydraTokForPreTraining:
    """A model with the stage's decoder; encoder (and decoder, if it is of the same kind) from the stage before."""
    config = HydraTokConfig.from_dict({**recipe.config.to_dict(), "decoder_config": stage.decoder_config.to_dict()})
    model = HydraTokForPreTraining._from_config(config, attn_implementation=recipe.attn_implementation)
    if previous is not None:
        weights = previous.state_dict()
        if type(previous.pixel_decoder) is not type(model.model.pixel_decoder):
            dropped = ("pixel_decoder", "bottleneck.decoder_up_proj")
            weights = {name: value for name, value in weights.items() if not name.startswith(dropped)}
        model.model.load_state_dict(weights, strict=False)
    return model


def train_tokenizer(recipe: Recipe, output_dir: Path, *, on_stage: Callable[[str], None] = logger.info) -> Path:
    """Runs every stage that is not done yet; the folder of the finished tokenizer."""
    world = ToyWorld(recipe.difficulty)
    previous = None
    for index, stage in enumerate(recipe.stages):
        folder = output_dir / stage.name
        final = folder / "final"
        if not has_folder(final):
            on_stage(f"{recipe.name}: stage {stage.name}, {stage.num_steps} steps")
            seed = recipe.seed + 1000 * index
            torch.manual_seed(seed)  # first weights, the same whether or not the stages before ran in this process

            def batches(step: int, stage=stage, seed=seed) -> Tensor:
                return toy_images(world, stage.batch_size, step_generator(seed + 1, step))

            trainer = TokenizerTrainer(
                create_stage_model(recipe, stage, previous), stage, batches, folder, seed=seed,
                log_every=recipe.log_every, save_every=recipe.save_every, sample_every=recipe.sample_every,
            )  # fmt: skip
            model = trainer.train().eval()
            if index == 0:
                unseen = (batches(stage.num_steps + 2 + i) for i in range(64))
                model.set_latents_statistics(*measure_latents(model, unseen, step_generator(seed, 2**31)))
            write_folder(final, model.save_pretrained)
        previous = HydraTokModel.from_pretrained(final)
    return final
