"""Low-rank adapters on linear layers: trained on top of frozen weights, then merged into them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .recipe import HydraStage, largest_modules


LORA = ".lora_"  # in the name of every parameter of an adapter and of no other


def add_adapters(model: nn.Module, stage: HydraStage, seed: int) -> None:
    """Adds adapters of rank `stage.lora_rank` to the linear layers that the stage trains in `lora_targets`, and freezes the rest.

    Scale and dropout are our choice: alpha = rank, none. Raises ValueError if the stage trains none of `lora_targets`.
    """
    from peft import inject_adapter_in_model  # pip install hydra_hf[train]

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(stage.lora_targets) and stage.learning_rate_of(name) > 0
    ]
    if not targets:
        raise ValueError(
            f"{stage.name}: lora_rank={stage.lora_rank}, but learning_rates={stage.learning_rates} names none of {stage.lora_targets}."
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config_of(stage.lora_rank, targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            LORA in name or (name in trained and not name.startswith((*stage.lora_targets, "lm_head")))
        )


def _config_of(rank: int, targets: list[str], saved: list[str] | None = None):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets, modules_to_save=saved)


def has_adapters(model: nn.Module) -> bool:
    return any(LORA in name for name, _ in model.named_parameters())


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Writes the adapters, and the modules that were trained in full, in the format of peft."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    first = next(iter(layers.values()))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    folder.mkdir(parents=True)
    _config_of(first.r["default"], sorted(layers), trained_modules(model)).save_pretrained(folder)
    weights = {f"base_model.model.{name.replace('.default', '')}": value for name, value in trained.items()}
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )


def trained_modules(model: nn.Module) -> list[str]:
    """The largest modules that are trained in full, next to the adapters."""
    return largest_modules(model, lambda name, parameter: parameter.requires_grad and LORA not in name)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Merges adapters into plain linear layers, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def describe_modules(model: nn.Module) -> str:
    """A line each for modules trained in full, frozen modules and adapters, with their numbers of parameters."""
    adapters = {name: parameter for name, parameter in model.named_parameters() if LORA in name}
    trained = trained_modules(model)
    frozen = largest_modules(model, lambda name, parameter: LORA in name or not parameter.requires_grad)
    tied = set(getattr(model, "all_tied_weights_keys", ()))

    def count(name: str) -> str:
        parameters = model.get_submodule(name).named_parameters(prefix=name)
        return f"{name} {sum(parameter.numel() for full_name, parameter in parameters if LORA not in full_name):,}"

    names = {"trained": trained, "frozen": [name for name in frozen if f"{name}.weight" not in tied]}
    lines = {title: ", ".join(map(count, found)) or "nothing" for title, found in names.items()}
    if adapters:
        lines["adapters"] = f"{sum(parameter.numel() for parameter in adapters.values()):,}"
    return "\n".join(f"{title}: {line}" for title, line in lines.items())
