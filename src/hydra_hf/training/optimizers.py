"""One optimizer for one stage: Muon for the matrices of hidden layers, AdamW for everything else."""

import torch
from torch import nn

from hydra_hf.modeling.layers import ZeroLinear

from .recipe import Stage


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW behind one interface; either may have no parameters."""

    def __init__(self, muon_groups: list[dict], adamw_groups: list[dict], weight_decay: float):
        self.parts = []
        if muon_groups:
            muon = torch.optim.Muon(muon_groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if adamw_groups:
            self.parts.append(torch.optim.AdamW(adamw_groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """A scheduler sets the rates on our groups, so they must be the parts' own."""
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


def is_hidden_matrix(module: nn.Module, parameter_name: str) -> bool:
    """Whether Muon may have it: a linear layer's weight, but no output layer, modulation or embedding."""
    is_linear = isinstance(module, nn.Linear) and not isinstance(module, ZeroLinear)
    return is_linear and parameter_name.endswith("weight") and "lm_head" not in parameter_name


def create_optimizer(model: nn.Module, stage: Stage) -> MuonAdamW:
    """Groups by rate; `freeze_unnamed` has said what is trained."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full_name = f"{module_name}.{name}"
            rate = stage.learning_rate_of(full_name)
            use_muon = stage.muon_scale > 0 and is_hidden_matrix(module, full_name)
            groups.setdefault((use_muon, rate), []).append(parameter)
    if not groups:
        raise ValueError(f"{stage.name} trains nothing: learning_rates={stage.learning_rates}.")
    make = [({"params": params, "lr": rate * (stage.muon_scale if muon else 1)}, muon) for (muon, rate), params in groups.items()]
    return MuonAdamW([g for g, muon in make if muon], [g for g, muon in make if not muon], stage.weight_decay)
