"""What the tests of other models share: the toy world with the same samples in every step, and a recipe for it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hydra_hf.data.prompts import PROMPTS
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.training.adapters import UnifiedObjective, UnifiedProcessor, train_unified, unified_rates
from hydra_hf.training.recipe import HydraStage, UnifiedLossWeights, UnifiedRecipe
from toy_models import toy_tokenizer


TASKS = {"understand": 2, "reconstruct": 2, "depth": 2, "segment": 2}
LOSSES = ("understand/language", "reconstruct/image", "depth/image", "segment/image")


class FixedBundles(ToyBundles):
    """The samples of the first step in every step, the noise of each step its own."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(0), "step": index}

    def samples(self, task: str, *args, **kwargs) -> list:
        """Painted after one prompt, so that nothing but the image says what to paint."""
        samples = super().samples(task, *args, **kwargs)
        for part in (part for sample in samples for part in sample.messages[0]["content"]):
            if task in PROMPTS and part["type"] == "text":
                part["text"] = PROMPTS[task][0]
        return samples


@dataclass(frozen=True, kw_only=True)
class FixedData(ToyData):
    def bundles(self, stage, processor, seed, *, max_length, **place) -> FixedBundles:
        return FixedBundles(self, processor, stage, seed, **place)


def tokenizer_with(**tokens: str) -> PreTrainedTokenizerFast:
    """The toy world's words, and special tokens as attributes."""
    return PreTrainedTokenizerFast(
        tokenizer_object=toy_tokenizer().backend_tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        extra_special_tokens=tokens, padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def unified_recipe(
    model_class: type[PreTrainedModel], init: Path, processor: UnifiedProcessor, *, rate: float = 3e-3, **changes
) -> UnifiedRecipe:
    """One stage on fixed samples; everything is trained that the model does not name as frozen."""
    stage = HydraStage(
        name="unimrg", num_steps=30, learning_rates=unified_rates(model_class, rate), tasks=TASKS, data=FixedData(),
        held_out=FixedData(is_held_out=True), num_held_out=2, loss_weights=UnifiedLossWeights(), warmup_steps=5,
        ema_decay=0.0, mixed_precision="no", drop_prompt=0.0,
    )  # fmt: skip
    return UnifiedRecipe(
        name="test", config=model_class.config_class.from_pretrained(init), stages=(replace(stage, **changes),),
        init=str(init), processor=processor, model_class=model_class, log_every=1, save_every=1000, sample_every=1000,
        guidance_scale=1.0,
    )  # fmt: skip


def rows_of(folder: Path, key: str = "understand/language") -> list[dict]:
    """Those of the log that have `key`."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def bundle_of(recipe: UnifiedRecipe, step: int = 0) -> dict:
    """What a run of the recipe sees in a step."""
    stage = recipe.stages[0]
    return stage.data.bundles(stage, recipe.processor, recipe.seed, max_length=1000)[step]


@torch.no_grad()
def losses_of(model: PreTrainedModel, recipe: UnifiedRecipe) -> dict[str, float]:
    """Of the samples that the recipe trains on, with the noise of the first step."""
    objective, bundle, losses = UnifiedObjective(recipe.stages[0], recipe.seed), bundle_of(recipe), {}
    for task in TASKS:
        inputs = objective.prepare(model, bundle, task)
        outputs = model.eval()(**inputs)
        losses |= {
            f"{task}/{name}": value.item() for name, value in objective.losses_of(model, inputs, outputs).items()
        }
    return losses


def assert_frozen_and_trained(before: PreTrainedModel, after: PreTrainedModel) -> None:
    """Every parameter has moved, except those that the class names as frozen."""
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(old, new) == name.startswith(type(before).frozen_modules), name
    for (name, old), (_, new) in zip(before.named_buffers(), after.named_buffers(), strict=True):
        assert torch.equal(old, new), name


def assert_losses_fall(init: Path, final: Path, recipe: UnifiedRecipe, factor: float) -> None:
    """The losses of the same samples with the same noise, before and after."""
    before, after = (losses_of(recipe.model_class.from_pretrained(folder), recipe) for folder in (init, final))
    assert set(before) == set(LOSSES)
    for name in LOSSES:
        assert after[name] < factor * before[name], (name, before[name], after[name])


def assert_adapters_are_what_was_trained(recipe: UnifiedRecipe, folder: Path) -> None:
    """A run with adapters in `folder`: the loss of the trained model is that of its saved adapters, and of the merged model."""
    from peft import PeftModel

    rates = unified_rates(recipe.model_class, 1e-2)
    stage = replace(
        recipe.stages[0], num_steps=4, warmup_steps=1, learning_rates=rates, lora_rank=2,
        lora_targets=recipe.model_class.adapted_modules,
    )  # fmt: skip
    recipe = replace(recipe, stages=(stage,))
    train_unified(recipe, folder)
    folder = folder / "unimrg"
    trained, base = (recipe.model_class.from_pretrained(recipe.init) for _ in range(2))
    UnifiedObjective(recipe.stages[0], recipe.seed).select_parameters(trained)
    (checkpoint,) = folder.glob("checkpoint-*")
    weights = load_file(checkpoint / "model.safetensors")
    missing = {name for name in set(trained.state_dict()) - set(weights) if "lm_head" not in name}  # tied
    assert not missing, missing
    trained.load_state_dict(weights, strict=False)
    expected, first = losses_of(trained, recipe), losses_of(base, recipe)
    for name in LOSSES:
        assert expected[name] != pytest.approx(first[name], rel=1e-4), (expected, first)
    opened = PeftModel.from_pretrained(base, folder / "final" / "adapter")
    merged = recipe.model_class.from_pretrained(folder / "final")
    for model in (opened, merged):
        found = losses_of(model, recipe)
        assert found == pytest.approx(expected, rel=1e-4), (found, expected)
    sizes = [path.stat().st_size for path in (folder / "final" / "adapter" / "adapter_model.safetensors",
                                              folder / "final" / "model.safetensors")]  # fmt: skip
    assert sizes[0] < sizes[1]


@torch.no_grad()
def assert_painted_follows_source(model, recipe: UnifiedRecipe, task: str, distance) -> None:
    """`distance(painted, targets)` (B,): with the images of a batch swapped, the painted maps swap too."""
    inputs = UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model.eval(), bundle_of(recipe), task)
    inputs.pop("generators")
    target, given = inputs.pop("target_pixel_values"), inputs.pop("pixel_values")
    for images, own, other in ((given, target, target.flip(0)), (given.flip(0), target.flip(0), target)):
        generator = torch.Generator().manual_seed(0)
        painted = model.generate_images(**inputs, pixel_values=images, guidance_scale=1.0, generator=generator)
        assert painted.shape == target.shape
        near, far = distance(painted, own), distance(painted, other)
        assert (near < 0.5 * far).all(), (near, far)
