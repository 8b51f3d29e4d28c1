"""Low-rank adapters on the language model and Sem-ViT: trained on top of frozen weights, then merged into them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hydra_hf.modeling import HydraForConditionalGeneration

from .recipe import HydraStage


ADAPTED = ("model.language_model", "model.vision_tower.sem_vit")
LORA = ".lora_"  # in the name of every parameter of an adapter and of no other


def add_adapters(model: HydraForConditionalGeneration, stage: HydraStage, seed: int) -> None:
    """Adapters of rank `stage.lora_rank` on the linear layers of what the stage trains; all else of it is frozen.

    Scale and dropout are our choice: alpha = rank, none. Raises ValueError if the stage trains neither module.
    """
    from peft import inject_adapter_in_model  # pip install hydra_hf[train]

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(ADAPTED) and stage.learning_rate_of(name) > 0
    ]
    if not targets:
        raise ValueError(
            f"{stage.name}: lora_rank={stage.lora_rank}, but learning_rates={stage.learning_rates} names none of {ADAPTED}."
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config_of(stage.lora_rank, targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LORA in name or (name in trained and not name.startswith((*ADAPTED, "lm_head"))))


def _config_of(rank: int, targets: list[str]):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)


def has_adapters(model: nn.Module) -> bool:
    return any(LORA in name for name, _ in model.named_parameters())


def save_adapters(model: HydraForConditionalGeneration, folder: Path) -> None:
    """The adapters alone, in the format of peft."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    first = next(iter(layers.values()))
    folder.mkdir(parents=True)
    _config_of(first.r["default"], sorted(layers)).save_pretrained(folder)
    save_file(
        {
            f"base_model.model.{name.replace('.default', '')}": parameter.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if LORA in name
        },
        folder / "adapter_model.safetensors",
    )


@torch.no_grad()
def merge_adapters(model: HydraForConditionalGeneration) -> HydraForConditionalGeneration:
    """The same function in plain linear layers, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model
