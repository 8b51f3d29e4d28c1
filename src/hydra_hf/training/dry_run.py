"""What a stage would see and cost, without training it: tokens, parameters, floating-point operations, memory.

The model is built on torch's meta device and a step, forward, losses and backward, is run on fake tensors, with the stage's
precision, gradient checkpointing and frozen modules: no weights are needed and no size is too large.

- Operations: torch's FlopCounterMode; for HYDRA, on one sample of a task's mean length, times the number of samples.
- Memory of one process under DDP: weights in fp32, AdamW's two moments (Muon's one), the average if there is one, frozen
  judges, DDP's buckets (as large as the gradients), and the peak of gradients and activations in a step of the longest
  samples; with `micro_batch_tokens`, of as many samples of the mean length as it holds. FSDP divides everything except
  activations and judges by the number of processes, and has no buckets. Fragmentation comes on top. A teacher counts as another
  encoder; its forward is not counted, nor are the attention of an edit's target to its source and a loss of pixels.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hydra_hf.data.images import size_shares
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.modeling.compat import enable_checkpointing
from hydra_hf.modeling.grid import Grid

from .lora import add_adapters
from .losses import reached_parameters
from .optimizers import create_optimizer
from .processes import num_accumulation_steps, partial_state, split_batch
from .recipe import HydraRecipe, HydraStage, Recipe, Stage, TokenizerStage, UnifiedRecipe, freeze_unnamed
from .task_report import TaskReport, look_at_tasks
from .tower_step import count_judges, create_judges, tower_step
from .vision_tower_trainer import create_stage_model


PARTS = ("gen_vit", "bottleneck", "sem_vit", "pixel_decoder")
TOWER_MODULES = (*(f"model.{part}" for part in PARTS), "decompressor")
MODULES = (
    *(f"model.vision_tower.{part}" for part in PARTS), "model.multi_modal_projector", "model.time_embedding",
    "model.language_model", "lm_head", "vision_head",
)  # fmt: skip


@dataclass(frozen=True)
class StageReport:
    """What `dry_run` finds out about one stage.

    `flops` are those of one optimizer step; `parameters` is module -> (all, trained); `memory` is in bytes, by kind; `tasks`
    is empty for a vision tower.
    """

    name: str
    num_steps: int
    batch_size: int
    num_processes: int
    accumulation: int
    flops: float
    tasks: dict[str, TaskReport]
    parameters: dict[str, tuple[int, int]]
    memory: dict[str, int]

    @property
    def num_samples(self) -> int:
        """The number of samples in the whole stage."""
        return self.num_steps * self.batch_size

    @property
    def sharded_memory(self) -> float:
        """Bytes of one process when weights, gradients, optimizer and average are sharded over all (FSDP2, ZeRO-3).

        The weights of one layer, gathered while it runs, come on top.
        """
        split = sum(self.memory[name] for name in ("weights", "gradients", "optimizer", "average"))
        return sum(self.memory.values()) - self.memory["buckets"] - split + split / self.num_processes

    def __str__(self) -> str:
        totals = [sum(counts) for counts in zip(*self.parameters.values())]
        lines = [
            f"{self.name}: {self.num_steps:,} steps, {self.num_samples:,} samples;"
            f" {self.num_processes} processes x {self.accumulation} micro steps"
        ]
        lines += [f"  {name}: {task}" for name, task in self.tasks.items()]
        lines.append(f"  a step: {self.flops:.3g} FLOPs; the stage: {self.flops * self.num_steps:.3g}")
        lines.append(f"  parameters: {totals[0]:,}, trained {totals[1]:,}")
        lines += [f"    {name}: {total:,}, trained {trained:,}" for name, (total, trained) in self.parameters.items()]
        memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.memory.items())
        lines.append(f"  memory of one process: {sum(self.memory.values()) / 2**30:.2f} GiB ({memory})")
        if self.num_processes > 1:
            lines.append(
                f"  memory of one process, sharded: {self.sharded_memory / 2**30:.2f} GiB and a gathered layer"
            )
        return "\n".join(lines)


def dry_run(recipe: Recipe, only: str | None = None, num_processes: int | None = None) -> list[StageReport]:
    """A report on every stage, or on `only` one, with the batch split over `num_processes`, by default those that run.

    Raises ValueError for a stage that the recipe does not have, a model that is not HYDRA, or less than one process.
    """
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"{num_processes=} must be at least 1.")
    if isinstance(recipe, UnifiedRecipe):
        raise ValueError(
            f"{recipe.name} has no dry run: only HYDRA and its vision tower can be counted without weights."
        )
    report = report_stage if isinstance(recipe, HydraRecipe) else report_tower_stage
    num_processes = num_processes or partial_state().num_processes
    reports = [report(recipe, stage, num_processes) for stage in recipe.stages if only in (None, stage.name)]
    if not reports:
        raise ValueError(f"{recipe.name} has no stage {only!r}; its stages are {[s.name for s in recipe.stages]}.")
    return reports


def report_stage(recipe: HydraRecipe, stage: HydraStage, num_processes: int = 1) -> StageReport:
    """The report on a stage of HYDRA."""
    tasks = look_at_tasks(recipe, stage)
    accumulation = count_micro_steps(recipe, stage, tasks, num_processes)
    which_length = 2 if recipe.micro_batch_tokens is None else 1  # packed: a long sample leaves less room
    model = meta_model(recipe, stage)
    parameters = count_parameters(model, MODULES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model)
        for name, task in tasks.items():
            flops = count_flops(lambda task=task: backward(hydra_loss(model, stage, task, 1, task.length[1])))
            tasks[name] = replace(task, flops=task.num_samples * flops)

        def micro_step() -> None:
            losses = []
            for task in tasks.values():
                num_samples = -(-task.num_samples // (num_processes * accumulation))
                losses.append(hydra_loss(model, stage, task, num_samples, task.length[which_length]))
            backward(sum(losses))

        model.zero_grad()  # a step allocates gradients again
        memory = memory_of(model, stage, measure_peak(micro_step, min(accumulation, 2)), num_processes)
    return StageReport(
        name=stage.name, num_steps=stage.num_steps, batch_size=sum(stage.tasks.values()), accumulation=accumulation,
        num_processes=num_processes, flops=sum(task.flops for task in tasks.values()), tasks=tasks,
        parameters=parameters, memory=memory,
    )  # fmt: skip


def count_micro_steps(recipe: HydraRecipe, stage: HydraStage, tasks: dict[str, TaskReport], num_processes: int) -> int:
    """Micro steps of one optimizer step; with a budget of tokens, as many as samples of the mean length need."""
    if recipe.micro_batch_tokens is None:
        return num_accumulation_steps(stage.tasks, num_processes, recipe.micro_batch_size)
    num_tokens = sum(math.ceil(task.num_samples / num_processes) * task.length[1] for task in tasks.values())
    return math.ceil(num_tokens / recipe.micro_batch_tokens)


def report_tower_stage(recipe: Recipe, stage: TokenizerStage, num_processes: int = 1) -> StageReport:
    """The report on a stage of the vision tower."""
    micro, accumulation = split_batch(stage.batch_size, num_processes, recipe.micro_batch_size)
    with torch.device("meta"):
        model = create_stage_model(recipe, stage, None).train()
    freeze_unnamed(model, stage)
    reached = reached_parameters(model, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in reached)
    parameters = count_parameters(model, TOWER_MODULES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        judges = create_judges(stage)
        for module in (model, *judges.values()):
            make_fake(module)

        shares = size_shares(stage.image_sizes or (recipe.config.image_size,))
        steps = [((1 - stage.clip_share) * share, partial(tower_step, model, stage, judges, micro, size=size))
                 for size, share in shares.items()]  # fmt: skip
        if stage.clip_share:
            num_clips = micro // stage.images_per_clip
            steps.append((stage.clip_share, partial(tower_step, model, stage, judges, num_clips, stage.num_frames)))
        peak, flops = 0, 0.0
        for share, step in steps:
            model.zero_grad()  # a step allocates gradients again
            peak = max(peak, measure_peak(step, min(accumulation, 2)) if share else 0)
            flops += share * num_processes * accumulation * (count_flops(step) if share else 0)
        memory = memory_of(model, stage, peak, num_processes) | {"judges": 4 * count_judges(model, stage, judges)}
    return StageReport(
        name=stage.name, num_steps=stage.num_steps, batch_size=stage.batch_size, accumulation=accumulation,
        num_processes=num_processes, flops=flops, tasks={}, parameters=parameters,
        memory=memory,
    )  # fmt: skip


def memory_of(model: nn.Module, stage: Stage, peak: int, num_processes: int) -> dict[str, int]:
    """Bytes by kind; `peak` is that of gradients and activations together."""
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "weights": weights,
        "gradients": gradients,
        "buckets": gradients if num_processes > 1 else 0,
        "optimizer": 4 * num_moments(model, stage),
        "average": weights if stage.ema_decay > 0 else 0,
        "activations": max(0, peak - gradients),
    }


def meta_model(recipe: HydraRecipe, stage: HydraStage) -> HydraForConditionalGeneration:
    """The recipe's model without weights, with the stage's adapters, and `requires_grad` only where the stage trains."""
    with torch.device("meta"):
        model = HydraForConditionalGeneration._from_config(recipe.config, attn_implementation="sdpa").train()
        freeze_unnamed(model, stage)
        if stage.lora_rank:
            add_adapters(model, stage, seed=0)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def count_parameters(model: nn.Module, modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Module -> (number of all parameters, of trained ones); a tied head counts as its embedding."""
    counts = {}
    for module in modules:
        parameters = [p for name, p in model.named_parameters() if name.startswith(f"{module}.")]
        if parameters:
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            counts[module] = (sum(parameter.numel() for parameter in parameters), trained)
    return counts


def num_moments(model: nn.Module, stage: Stage) -> int:
    """The number of values that the optimizer keeps: two for a parameter of AdamW, one for one of Muon."""
    return sum(
        parameter.numel() * (1 if isinstance(part, torch.optim.Muon) else 2)
        for part in create_optimizer(model, stage).parts
        for group in part.param_groups
        for parameter in group["params"]
    )


# Costs


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it: `alive` now, and `peak`."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.storages.update(storages_of((args, kwargs)))  # a view of a weight is not new memory
        output = function(*args, **(kwargs or {}))
        for storage in storages_of(output):
            if storage not in self.storages:
                self.storages.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, storage.nbytes())
        return output

    def free(self, size: int) -> None:
        self.alive -= size


def storages_of(values) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def count_flops(step: Callable[[], None]) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure_peak(step: Callable[[], None], repeats: int) -> int:
    """Peak bytes in `repeats` of a step that add up gradients; memory from before does not count.

    Separate from counting operations, which keeps recomputed activations alive.
    """
    with PeakMemory() as memory:
        for _ in range(repeats):
            step()
    return memory.peak


def make_fake(model: nn.Module) -> None:
    """Moves a model from the meta device to fake CPU tensors, inside FakeTensorMode; tied weights stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if old not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[old])


def hydra_loss(
    model: HydraForConditionalGeneration, stage: HydraStage, task: TaskReport, num_samples: int, length: float
) -> Tensor:
    """The loss that `HydraObjective` gives for a task's batch, with fake contents."""
    config, length = model.config, max(1, round(length))
    num_images = max(1, round(num_samples * task.num_images)) if task.num_images else 0
    num_scored = math.ceil(num_samples * task.label_tokens)
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
        embeds = model.get_input_embeddings()(torch.empty(num_samples, length, dtype=torch.long))
        if num_images:
            tokens = (task.image_tokens / task.num_images - config.num_time_tokens) / task.num_frames
            grid = (round(task.num_frames), *[max(1, round(tokens**0.5))] * 2)
            grids, sigma = [grid] * num_images, torch.empty(num_images)
            latents = fake_latents(model, num_images, grid)
            image_embeds = model.model.get_image_embeds(latents, sigma, grids)
            is_image = torch.empty(num_samples, length, 1, dtype=torch.bool).expand_as(embeds)
            embeds = embeds.masked_scatter(is_image, image_embeds.to(embeds.dtype))
        mask = torch.empty(num_samples, 1, length, length, dtype=torch.bool)
        states = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        states = states.last_hidden_state.flatten(0, 1)
        if num_scored:  # the head runs where a label is
            logits = model.lm_head(states[:num_scored])
            labels = torch.empty(num_scored, dtype=torch.long)
            losses.append(nn.functional.cross_entropy(logits.float(), labels))
        if task.num_generated:
            num_generated = max(1, round(num_samples * task.num_generated))
            latents = latents[: num_generated * math.prod(grid)]
            velocity = model._predict_velocity(
                states[: len(latents)], latents, sigma[:num_generated], grids[:num_generated]
            )
            losses.append(nn.functional.mse_loss(velocity, torch.empty_like(velocity)))
    return sum(losses, torch.zeros(()))


def backward(loss: Tensor) -> None:
    """Runs backward, unless the task reaches no trained module."""
    if loss.requires_grad:
        loss.backward()


@torch.no_grad()
def fake_latents(model: HydraForConditionalGeneration, num_images: int, grid: Grid) -> Tensor:
    """Packed latents (num_images * t * h * w, C), encoded by the vision tower."""
    tower, vision = model.model.vision_tower, model.config.vision_config
    num_frames = 1 + (grid[0] - 1) * vision.temporal_compression_ratio
    size = [side * vision.patch_size for side in grid[1:]]
    states = tower.gen_vit(torch.empty(num_images, vision.num_channels, num_frames, *size))
    return tower.bottleneck(states).mean.flatten(0, 1).float()
