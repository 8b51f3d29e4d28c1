"""What a stage would see and cost, without training it: tokens, parameters, floating-point operations, memory.

The model is built on torch's meta device, so no weights are needed and no size is too large. Estimates:

- Operations: torch's FlopCounterMode on one sample of a task's mean length, times the samples. A module that is trained
  costs three forwards (itself, its inputs' gradients, its weights'), a frozen one behind a trained one two, any other one
  forward; with gradient checkpointing one forward more where there are gradients.
- Memory of one process under DDP: weights and gradients in fp32, AdamW's two moments (Muon's one), the average if there is
  one, and the activations of one micro step: what autograd keeps of one sample of mean length, times its samples, in the
  dtype of mixed precision. DDP's buckets (as large as the gradients) and the allocator's losses come on top;
  FSDP divides all but the activations by the number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraConfig, HydraForConditionalGeneration
from hydra_hf.modeling.compat import enable_checkpointing

from .hydra_trainer import create_bundles
from .lora import add_adapters
from .optimizers import create_optimizer
from .processes import num_accumulation_steps, partial_state
from .recipe import HydraRecipe, HydraStage, freeze_unnamed


NUM_SEEN = 16  # samples of each task that are read
NOMINAL_TEXT_TOKENS = 77  # of a sample that is not read
TOWER = "model.vision_tower."
MODULES = (
    f"{TOWER}gen_vit", f"{TOWER}bottleneck", f"{TOWER}sem_vit", f"{TOWER}pixel_decoder", "model.multi_modal_projector",
    "model.time_embedding", "model.language_model", "lm_head", "vision_head",
)  # fmt: skip


@dataclass(frozen=True)
class TaskReport:
    """`length` is (min, mean, max); tokens and images are means over samples; `num_seen` is 0 for nominal lengths."""

    num_samples: int
    num_seen: int
    length: tuple[float, float, float]
    image_tokens: float
    label_tokens: float
    num_images: float
    generates: bool
    flops: float = 0.0  # of all samples, forward and backward

    def __str__(self) -> str:
        low, mean, high = (round(length) for length in self.length)
        source = f"{self.num_seen} read" if self.num_seen else "nominal"
        return (
            f"{self.num_samples} samples ({source}) of {low} / {mean} / {high} tokens (min / mean / max),"
            f" {self.image_tokens:.0f} of images, {self.label_tokens:.0f} with a text label; {self.flops:.3g} FLOPs"
        )


@dataclass(frozen=True)
class StageReport:
    """What `dry_run` finds out about one stage; `parameters` are module -> (all, trained), `memory` bytes by kind."""

    name: str
    num_steps: int
    num_processes: int
    accumulation: int
    tasks: dict[str, TaskReport]
    parameters: dict[str, tuple[int, int]]
    memory: dict[str, int]

    @property
    def flops(self) -> float:
        """Of one optimizer step."""
        return sum(task.flops for task in self.tasks.values())

    @property
    def num_samples(self) -> int:
        """Of the whole stage."""
        return self.num_steps * sum(task.num_samples for task in self.tasks.values())

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
        return "\n".join(lines)


def dry_run(recipe: HydraRecipe, only: str | None = None) -> list[StageReport]:
    """A report of every stage, or of `only` one. ValueError for a stage that the recipe does not have."""
    reports = [report_stage(recipe, stage) for stage in recipe.stages if only in (None, stage.name)]
    if not reports:
        raise ValueError(f"{recipe.name} has no stage {only!r}; its stages are {[s.name for s in recipe.stages]}.")
    return reports


def report_stage(recipe: HydraRecipe, stage: HydraStage) -> StageReport:
    processes = partial_state()
    model = meta_model(recipe, stage)
    tasks, activations = {}, 0
    accumulation = num_accumulation_steps(stage.tasks, processes.num_processes, recipe.micro_batch_size)
    for name, task in look_at_tasks(recipe, stage).items():
        tasks[name] = replace(task, flops=task.num_samples * count_flops(model, recipe, task))
        in_memory = -(-task.num_samples // (processes.num_processes * accumulation))
        activations += in_memory * count_activations(model, recipe, task)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in model.parameters())
    memory = {
        "weights": 4 * weights,
        "gradients": 4 * trained,
        "optimizer": 4 * num_moments(model, stage),
        "average": 4 * weights if stage.ema_decay > 0 else 0,
        "activations": activations // (2 if stage.mixed_precision == "bf16" else 1),
    }
    return StageReport(
        name=stage.name, num_steps=stage.num_steps, num_processes=processes.num_processes, accumulation=accumulation,
        tasks=tasks, parameters=count_parameters(model), memory=memory,
    )  # fmt: skip


def meta_model(recipe: HydraRecipe, stage: HydraStage) -> HydraForConditionalGeneration:
    """The recipe's model without weights, with the stage's adapters and with gradients where it trains."""
    with torch.device("meta"):
        model = HydraForConditionalGeneration._from_config(recipe.config, attn_implementation="sdpa").train()
        freeze_unnamed(model, stage)
        if stage.lora_rank:
            add_adapters(model, stage, seed=0)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def count_parameters(model: HydraForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """Module -> all parameters, and those that are trained; a tied head counts as its embedding."""
    counts = {}
    for module in MODULES:
        parameters = [p for name, p in model.named_parameters() if name.startswith(f"{module}.")]
        if parameters:
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            counts[module] = (sum(parameter.numel() for parameter in parameters), trained)
    return counts


def num_moments(model: nn.Module, stage: HydraStage) -> int:
    """Numbers that the optimizer remembers: two for a parameter of AdamW, one for one of Muon."""
    return sum(
        parameter.numel() * (1 if isinstance(part, torch.optim.Muon) else 2)
        for part in create_optimizer(model, stage).parts
        for group in part.param_groups
        for parameter in group["params"]
    )


# Tokens


def look_at_tasks(recipe: HydraRecipe, stage: HydraStage) -> dict[str, TaskReport]:
    """From the first samples of the stage's data; without data from nominal lengths."""
    if recipe.data_of(stage) is None:
        return {task: nominal_task(task, count, recipe.config) for task, count in stage.tasks.items()}
    few = replace(stage, tasks={task: min(count, NUM_SEEN) for task, count in stage.tasks.items()})
    bundle = create_bundles(recipe, few, recipe.seed)[0]
    return {task: seen_task(bundle[task], count, recipe.config) for task, count in stage.tasks.items()}


def nominal_task(task: str, count: int, config: HydraConfig) -> TaskReport:
    """77 tokens of text, labels where text is scored; images of the ViT's own size, as many as the task's form has."""
    row = TASKS[task]
    num_images = row.num_images
    vision = config.vision_config
    image_tokens = num_images * (config.num_time_tokens + (vision.image_size // vision.patch_size) ** 2)
    length = NOMINAL_TEXT_TOKENS + image_tokens
    return TaskReport(
        num_samples=count, num_seen=0, length=(length, length, length), image_tokens=image_tokens, num_images=num_images,
        label_tokens=NOMINAL_TEXT_TOKENS if row.scores_text else int(row.generates), generates=row.generates,
    )  # fmt: skip


def seen_task(batch: dict[str, Tensor], count: int, config: HydraConfig) -> TaskReport:
    """Of one collated batch."""
    length = batch["attention_mask"].sum(dim=1).float()
    images = batch["image_grid_thw"] if "image_grid_thw" in batch else torch.empty(0)
    return TaskReport(
        num_samples=count,
        num_seen=len(length),
        length=(length.min().item(), length.mean().item(), length.max().item()),
        image_tokens=(batch["mm_token_type_ids"] == 1).sum().item() / len(length),
        label_tokens=(batch["labels"][:, 1:] != -100).sum().item() / len(length),
        num_images=len(images) / len(length),
        generates=bool(len(images)) and bool(batch["is_generated"].any()),
    )


# Costs


Part = tuple[str, Callable[[], Tensor], float]  # module, its forward on one sample's size, how often a sample runs it


def parts_of(model: HydraForConditionalGeneration, task: TaskReport) -> Iterator[Part]:
    """The modules that a sample of mean length goes through, in order; images of the mean number of tokens."""
    config, dtype = model.config, torch.float32
    vision, hidden_size = config.vision_config, config.text_config.hidden_size
    length, tower = max(1, round(task.length[1])), model.model.vision_tower

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    if task.num_images:
        num_tokens = task.image_tokens / task.num_images - config.num_time_tokens
        side = max(1, round(num_tokens**0.5))
        size = side * vision.patch_size
        tokens, sigma, grids = empty(side * side, vision.latent_channels), empty(1), [(1, side, side)]
        yield f"{TOWER}gen_vit", lambda: tower.gen_vit(empty(1, vision.num_channels, size, size)), task.num_images
        yield f"{TOWER}sem_vit", lambda: model.model.get_image_embeds(tokens, sigma, grids), task.num_images
    mask, embeds = empty(1, 1, length, length), empty(1, length, hidden_size)
    yield (
        "model.language_model",
        lambda: (
            model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        ),
        1,
    )
    num_scored = max(1, round(task.label_tokens))
    yield "lm_head", lambda: model.lm_head(empty(1, num_scored, hidden_size)), 1
    if task.generates:
        states = empty(1, side * side, hidden_size)
        yield "vision_head", lambda: model.vision_head(states, tokens[None], sigma, grids), task.num_images


def gradients_of(model: nn.Module, module: str, is_behind_trained: bool) -> tuple[bool, bool]:
    """Whether a module is trained, and whether gradients go through it."""
    weights = model.get_submodule(module).parameters()
    is_trained = any(parameter.requires_grad for parameter in weights)
    return is_trained, is_trained or is_behind_trained


def count_flops(model: HydraForConditionalGeneration, recipe: HydraRecipe, task: TaskReport) -> float:
    """Of one sample, forward and backward."""
    total, has_gradients = 0.0, False
    for module, forward, repeats in parts_of(model, task):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        is_trained, has_gradients = gradients_of(model, module, has_gradients)
        recomputes = recipe.gradient_checkpointing and has_gradients and module != "lm_head"
        passes = 1 + has_gradients + is_trained + recomputes
        total += repeats * passes * counter.get_total_flops()
    return total


def count_activations(model: HydraForConditionalGeneration, recipe: HydraRecipe, task: TaskReport) -> int:
    """Bytes in fp32 that autograd keeps of one sample, weights not counted."""
    owned = {parameter.untyped_storage()._cdata for parameter in [*model.parameters(), *model.buffers()]}
    total, has_gradients = 0.0, False
    for module, forward, repeats in parts_of(model, task):
        is_behind = has_gradients
        _, has_gradients = gradients_of(model, module, is_behind)
        if has_gradients:
            total += repeats * kept_bytes(forward, owned)
    return int(total)


def kept_bytes(forward: Callable[[], Tensor], owned: set[int]) -> int:
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in owned:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
