"""Folds in a vision tower that knew images alone: what they start from, and training that leaves the latents of images unchanged."""

import torch
from torch import Tensor, nn

from hydra_hf.modeling import HydraTokConfig, HydraTokModel
from hydra_hf.modeling.temporal import fold_factors, widen_projection

from .recipe import TokenizerStage


FOLDS = ("gen_vit.folds.",)  # new in a model for clips, and at first the identity for images
PATCH_WEIGHT = "gen_vit.embeddings.projection.weight"
ENCODER = ("gen_vit.", "bottleneck.norm.", "bottleneck.down_proj.")  # all that latents depend on


def add_folds(weights: dict[str, Tensor], config: HydraTokConfig) -> dict[str, Tensor]:
    """The weights of a model for images as those of a model with the folds of `config`, without `FOLDS`: latents of images stay
    the same."""
    factor = fold_factors(config.temporal_fold_layers).get(0, 1)
    return {**weights, PATCH_WEIGHT: widen_projection(weights[PATCH_WEIGHT], factor)}


def fold_weights(model: HydraTokModel) -> dict[str, tuple[nn.Parameter, int]]:
    """Weights that read a group of frames, by name, and how many frames they read; the last is the anchor's."""
    gen_vit = model.gen_vit
    weights = {f"gen_vit.folds.{layer}.projection.weight": (fold.projection.weight, fold.factor)
               for layer, fold in gen_vit.folds.items()}  # fmt: skip
    if gen_vit.embeddings.fold_factor > 1:
        weights[PATCH_WEIGHT] = (gen_vit.embeddings.projection.weight, gen_vit.embeddings.fold_factor)
    return weights


def changes_image_latents(model: HydraTokModel, stage: TokenizerStage) -> bool:
    """Whether a stage trains what the latents of images depend on."""
    names = [f"model.{name}" for name, _ in model.named_parameters() if name.startswith(ENCODER)]
    return not stage.keeps_image_latents and any(map(stage.learning_rate_of, names))


def check_kept_latents(model: HydraTokModel, stage: TokenizerStage) -> None:
    """Raises ValueError if a stage that keeps the latents of images trains more of the encoder than `fold_weights`."""
    folds = fold_weights(model)
    for name, _ in model.named_parameters():
        if name.startswith(ENCODER) and name not in folds and stage.learning_rate_of(f"model.{name}"):
            raise ValueError(f"{stage.name}: keeps_image_latents=True, expected only {list(folds)} to be trained of the encoder,"
                             f" got a learning rate for {name}.")  # fmt: skip


@torch.no_grad()
def zero_anchor_gradients(model: HydraTokModel) -> None:
    """Sets the gradients of what folds read of anchors to zero."""
    for weight, factor in fold_weights(model).values():
        if weight.grad is not None:
            weight.grad[:, -(weight.shape[1] // factor) :] = 0
