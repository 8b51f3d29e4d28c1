"""The optimizer of a stage, Muon for the matrices of hidden layers and AdamW for everything else; and the average."""

import logging

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hydra_hf.modeling.layers import ZeroLinear

from .recipe import Stage


logger = logging.getLogger(__name__)


def create_average(model: nn.Module, stage: Stage, is_sharded: bool) -> AveragedModel | None:
    """An exponential moving average that forgets its start: step n has a weight of at least 9 / (10 + n).

    None if `stage.ema_decay` is 0; None, with a warning, if FSDP or DeepSpeed shard the weights.
    """
    if is_sharded and stage.ema_decay > 0:
        logger.warning("%s: weights are sharded, so no average of them is kept: ema_decay=0.", stage.name)
    if is_sharded or stage.ema_decay <= 0:
        return None
    decay = stage.ema_decay

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], num_averaged: Tensor) -> None:
        step = int(num_averaged)
        torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + step) / (10 + step)))

    return AveragedModel(model, multi_avg_fn=update)


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW behind one interface; either may have no parameters."""

    def __init__(self, muon_groups: list[dict], adamw_groups: list[dict], weight_decay: float):
        self.parts = []
        if muon_groups:
            muon = torch.optim.Muon(muon_groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if adamw_groups:
            self.parts.append(
                torch.optim.AdamW(adamw_groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
            )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """A scheduler sets the rates of this optimizer's groups, so they must be those of its parts."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def shardable(optimizer: MuonAdamW, stage: Stage) -> torch.optim.AdamW:
    """The AdamW part alone, whose state FSDP and DeepSpeed can shard. Raises ValueError for Muon, which needs whole matrices."""
    if stage.muon_scale > 0:
        raise ValueError(
            f"{stage.name}: muon_scale={stage.muon_scale}, expected 0: Muon needs whole matrices, which FSDP and"
            " DeepSpeed do not keep."
        )
    (adamw,) = optimizer.parts
    return adamw


INPUT_AND_OUTPUT_LAYERS = ("lm_head", "pixel_decoder.out_proj", "pixel_decoder.patch_embedding", "decompressor.head")


def is_hidden_matrix(module: nn.Module, module_name: str, parameter_name: str) -> bool:
    """Whether Muon may train the parameter: the weight of a linear layer, except embeddings, modulations and output layers."""
    is_linear = isinstance(module, nn.Linear) and not isinstance(module, ZeroLinear)
    return is_linear and parameter_name == "weight" and not module_name.endswith(INPUT_AND_OUTPUT_LAYERS)


def decays(module: nn.Module, parameter_name: str) -> bool:
    """Whether the parameter has weight decay: matrices and kernels do; biases, norms, embeddings and layer scales do not."""
    return isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and parameter_name == "weight"


def create_optimizer(model: nn.Module, stage: Stage) -> MuonAdamW:
    """An optimizer with groups by rate and weight decay, after `freeze_unnamed`. Raises ValueError if nothing is trained."""
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    seen = set()  # a tied head is its embedding
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate = stage.learning_rate_of(f"{module_name}.{name}")
            use_muon = stage.muon_scale > 0 and is_hidden_matrix(module, module_name, name)
            groups.setdefault((use_muon, rate, decays(module, name)), []).append(parameter)
    if not groups:
        raise ValueError(f"{stage.name} trains nothing: learning_rates={stage.learning_rates}.")
    parts: dict[bool, list[dict]] = {True: [], False: []}
    for (use_muon, rate, has_decay), parameters in groups.items():
        weight_decay = stage.weight_decay if has_decay else 0.0
        rate = rate * stage.muon_scale if use_muon else rate
        parts[use_muon].append({"params": parameters, "lr": rate, "weight_decay": weight_decay})
    return MuonAdamW(parts[True], parts[False], stage.weight_decay)
