"""What FSDP2 and DeepSpeed, which shard weights and optimizer over the processes, need.

Precision is the same under every launcher: weights, gradients, their sums, noise levels and losses are fp32, and the matrix
products of a forward are in `mixed_precision`, by autocast. So a sharded run has the losses of one process.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hydra_hf.files import write_text
from hydra_hf.modeling import HydraForConditionalGeneration

from .recipe import Stage


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def launcher_precision(stage: Stage) -> str:
    """The `mixed_precision` to pass to accelerate: with "bf16", DeepSpeed would also store the weights in it."""
    return "no" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else stage.mixed_precision


def configure_sharding(accelerator: Accelerator, stage: Stage, model: nn.Module) -> None:
    """Sets precision and clipping of the stage, and the layers that FSDP gathers one by one; does nothing for DDP.

    Raises ValueError for FSDP 1.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        configure_fsdp(accelerator.state.fsdp_plugin, model)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        is_bf16 = stage.mixed_precision == "bf16"
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "gradient_clipping": stage.max_grad_norm,
            "bf16": {"enabled": False},  # otherwise weights and statistics would be stored in bf16
            # No module counts as safe, so that gradients are summed in fp32.
            "torch_autocast": {"enabled": is_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }


def configure_fsdp(plugin, model: nn.Module) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}, expected 2: see examples/accelerate/fsdp.yaml.")
    # FSDP casts neither weights nor inputs nor outputs: `autocast` does, as under DDP.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_to_wrap(model)


def layers_to_wrap(model: nn.Module) -> list[str]:
    """The classes of the model's layers, whatever its language model and decoder: those that can be checkpointed.

    Of HYDRA they are the language model's alone. How often a process calls layers of the vision tower and the vision head
    depends on its own images, their sizes and their sources, and gathering is a call that all processes have to make: these
    are gathered with the rest of the model, once.
    """
    layered = model.model.language_model if isinstance(model, HydraForConditionalGeneration) else model
    return sorted(
        {type(module).__name__ for module in layered.modules() if isinstance(module, GradientCheckpointingLayer)}
    )


def autocast(accelerator: Accelerator, stage: Stage):
    """The autocast context of a forward; accelerate has none for sharded weights."""
    if accelerator.distributed_type in SHARDED:
        return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=stage.mixed_precision == "bf16")
    return accelerator.autocast()


def launcher_of(accelerator: Accelerator) -> str:
    names = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    return names.get(accelerator.distributed_type, "DDP")


def save_launcher(accelerator: Accelerator, checkpoint: Path) -> None:
    write_text(checkpoint / "launcher.json", json.dumps({"launcher": launcher_of(accelerator)}))


def check_launcher(accelerator: Accelerator, checkpoint: Path) -> None:
    """Raises ValueError for a checkpoint of another launcher: their files differ. A single process counts as DDP."""
    saved = json.loads((checkpoint / "launcher.json").read_text())["launcher"]
    if saved != (expected := launcher_of(accelerator)):
        raise ValueError(
            f"{checkpoint} was saved under {saved}, and this run uses {expected}: resume it as it was started, or"
            " train to the end of the stage, whose result opens under any launcher."
        )
