"""A micro step of a vision tower's training with fake contents, for the dry run: its networks without weights, its losses."""

import torch
from torch import nn

from hydra_hf.modeling import HydraTokForPreTraining

from .discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss
from .losses import distill_loss, frames_of, tokenizer_losses, training_inputs, weighted_sum
from .recipe import TokenizerStage
from .teachers import blank_perceptual


def create_judges(stage: TokenizerStage) -> dict[str, nn.Module]:
    """The judges that the losses need apart from the teacher, without weights."""
    judges: dict[str, nn.Module] = {}
    if stage.loss_weights.perceptual > 0:
        judges["perceptual"] = blank_perceptual(stage.perceptual_backbone)
    if stage.loss_weights.discriminator > 0:
        with torch.device("meta"):
            judges["discriminator"] = PatchDiscriminator()
    return judges


def count_judges(model: HydraTokForPreTraining, stage: TokenizerStage, judges: dict[str, nn.Module]) -> int:
    """The number of values of judges: weights of frozen ones; weights and two moments of the discriminator (the step has its
    gradients). A teacher counts as large as the student's ViT."""
    counts = {name: sum(parameter.numel() for parameter in judge.parameters()) for name, judge in judges.items()}
    weights = stage.loss_weights
    num_teachers = (weights.distill > 0) + (weights.video_distill > 0)
    layers = [model.model.gen_vit, model.model.sem_vit]
    teachers = num_teachers * sum(parameter.numel() for part in layers for parameter in part.parameters())
    return teachers + counts.get("perceptual", 0) + 3 * counts.get("discriminator", 0)


def tower_step(
    model: HydraTokForPreTraining,
    stage: TokenizerStage,
    judges: dict[str, nn.Module],
    num_images: int,
    num_frames: int | None = None,
    size: int | None = None,
) -> None:
    """A micro step of `TokenizerTrainer`, with fake contents, of images or of clips of `num_frames`."""
    weights, inputs = stage.loss_weights, training_inputs(model.config, num_images, num_frames, size)
    pixel_values, layers = inputs["pixel_values"], stage.compared_layers
    _, *size = model.model.get_grid(pixel_values)
    with torch.autocast("cpu", torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
        outputs = model(**inputs, distill_layers=layers)
    losses = tokenizer_losses(outputs, pixel_values, weights)
    if layers is not None:
        targets = [torch.empty(state.shape) for state in outputs.hidden_states]
        losses["distill"] = distill_loss(outputs.hidden_states, targets, (1, *size))
    if weights.video_distill > 0:
        target = torch.empty(outputs.video_states.shape)
        losses["video_distill"] = distill_loss([outputs.video_states], [target], (target.shape[1], 1, 1))
    images, copies = frames_of(pixel_values), frames_of(outputs.clean_pixel_values)
    if weights.perceptual > 0:
        losses["perceptual"] = judges["perceptual"](copies, images).mean()
    if weights.adversarial > 0:
        judges["discriminator"].requires_grad_(False)
        losses["adversarial"] = adversarial_loss(judges["discriminator"](copies))
        judges["discriminator"].requires_grad_(True)
    weighted_sum(losses, weights).backward()
    if weights.discriminator > 0:
        discriminator_loss(judges["discriminator"](images), judges["discriminator"](copies.detach())).backward()
