"""Tokens a second of a training step: samples packed into rows without padding, against the same samples in padded batches.

On a CPU, seconds are the CPU time of this process.
"""

import statistics
import time

import torch
from common import DTYPES, parser, report, synchronize
from models import hydra_config, random_model, size_name, tiny_config
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hydra_hf.data.packing import count_micro_batches, sample_lengths, split_bundle
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.recipe import HydraStage


BAR = 1.5
NUM_SAMPLES = 4  # of each task
LENGTHS = (20, 200)
TASKS = ("text", "understand", "generate")


def sample(task: str, length: int, config, generator: torch.Generator) -> dict[str, Tensor | None]:
    """About `length` random tokens, three quarters of them of a square image where the task has one."""
    vision, image = config.vision_config, None
    text = torch.randint(6, config.text_config.vocab_size, (length,), generator=generator)
    ids, labels = text, text.masked_fill(torch.arange(length) < length // 2, -100)
    if task != "text":
        side = int((0.75 * length) ** 0.5)
        image = 2 * torch.rand(side * side, 3 * vision.patch_size**2, generator=generator) - 1
        block = torch.full((config.num_time_tokens + side * side,), config.image_token_id)
        start, end = (torch.tensor([getattr(config, f"vision_{edge}_token_id")]) for edge in ("start", "end"))
        text = text[: max(2, length - len(block) - 2)]
        parts = [start, block, end, text] if task == "understand" else [text, start, block, end]
        ids = torch.cat(parts)
        is_label = torch.arange(len(ids)) >= len(ids) - len(text) // 2 if task == "understand" else ids == start
        labels = ids.masked_fill(~is_label, -100)
    return {"input_ids": ids, "labels": labels, "image": image}


def padded_batch(task: str, samples: list[dict], config) -> dict[str, Tensor]:
    """What `collate` makes of samples: padded on the left, their images packed."""
    pad = {"input_ids": 0, "labels": -100}
    batch = {name: pad_sequence([each[name] for each in samples], True, value, "left") for name, value in pad.items()}
    lengths = [len(each["input_ids"]) for each in samples]
    batch["attention_mask"] = pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], True, 0, "left")
    batch["mm_token_type_ids"] = (batch["input_ids"] == config.image_token_id).long()
    images = [each["image"] for each in samples if each["image"] is not None]
    if images:
        sides = [round(len(image) ** 0.5) for image in images]
        batch["pixel_values"] = torch.cat(images)
        batch["image_grid_thw"] = torch.tensor([(1, side, side) for side in sides])
        batch["is_generated"] = torch.full((len(images),), task == "generate")
    return {**batch, "num_samples": len(samples)}


def mixed_bundle(config) -> dict:
    """Samples of three tasks; the logarithms of their lengths are spread evenly over a factor of 10."""
    generator, (shortest, longest) = torch.Generator().manual_seed(0), LENGTHS
    bundle = {"step": 0, "rows": {task: list(range(NUM_SAMPLES)) for task in TASKS}}
    for task in TASKS:
        shares = torch.rand(NUM_SAMPLES, generator=generator)
        shares[:2] = torch.tensor([0.0, 1.0])
        lengths = (shortest * (longest / shortest) ** shares).round().int().tolist()
        samples = [sample(task, length, config, generator) for length in lengths]
        bundle[task] = padded_batch(task, samples, config)
    return bundle


def train(model: nn.Module, objective: HydraObjective, bundles: list[dict]) -> float:
    """Runs forward and backward of all bundles as the trainer does, and returns the loss."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    counts = [{task: objective.count_targets(model, bundle[task]) for task in TASKS} for bundle in bundles]
    for bundle, own in zip(bundles, counts):
        losses = []
        for task in TASKS:
            batch = objective.prepare(model, bundle, task)
            values = objective.losses_of(model, batch, model(**batch))
            for name, value in values.items():
                losses.append(value * own[task][name] / sum(each[task][name] for each in counts))
        loss = sum(losses)
        loss.backward()
        total += loss.item()
    return total


def measure(model: nn.Module, arguments) -> dict:
    objective = HydraObjective(HydraStage(name="packing", num_steps=1, learning_rates={}, tasks={}), seed=0)
    bundle = mixed_bundle(model.config)
    lengths = [sample_lengths(bundle[task]) for task in TASKS]
    padded_tokens = sum(bundle[task]["input_ids"].numel() for task in TASKS)
    number = count_micro_batches(bundle, TASKS, padded_tokens // 3)
    samples = {"padded": [bundle], "packed": split_bundle(bundle, TASKS, number)}
    bundles = {name: [on_device(each, arguments.device) for each in parts] for name, parts in samples.items()}
    losses = {name: train(model, objective, parts) for name, parts in bundles.items()}  # also warms up
    difference = abs(losses["padded"] - losses["packed"]) / losses["padded"]
    assert arguments.dtype != "fp32" or difference < 1e-4, f"the two losses are {losses}"
    seconds = {name: [] for name in bundles}
    # the CPU's other work counts little
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    for _ in range(arguments.runs):  # they take turns: a slow minute of the machine slows both
        for name, parts in bundles.items():
            synchronize()
            start = clock()
            train(model, objective, parts)
            synchronize()
            seconds[name].append(clock() - start)
    num_tokens = sum(map(sum, lengths))
    return {
        "lengths": f"{min(map(min, lengths))} to {max(map(max, lengths))}", "tokens": num_tokens,
        "with padding": padded_tokens, "parts": number,
        **{f"{name} /s": num_tokens / statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(slow / fast for slow, fast in zip(seconds["padded"], seconds["packed"])),
        "bar": BAR, "difference of losses": difference,
    }  # fmt: skip


def on_device(bundle: dict, device: str) -> dict:
    moved = {
        task: {n: v.to(device) if isinstance(v, Tensor) else v for n, v in bundle[task].items()} for task in TASKS
    }
    return {**bundle, **moved}


def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=1).parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    config = tiny_config() if arguments.tiny else hydra_config("0.5B", arguments.layers)
    model = random_model(config, DTYPES[arguments.dtype], arguments.device).train()
    row = measure(model, arguments)
    report(f"Tokens a second of a training step, {size_name('0.5B', arguments)}", [row], arguments)


if __name__ == "__main__":
    main()
