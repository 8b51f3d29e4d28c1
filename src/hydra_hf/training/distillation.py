"""L_dist: semantic states after frozen teachers of images and of clips. HYDRA, section 3.3; HYDRA-X, section 2."""

from torch import Tensor, nn

from hydra_hf.modeling import HydraTokModel
from hydra_hf.modeling.outputs import HydraTokForPreTrainingOutput

from .losses import distill_loss
from .recipe import TokenizerStage
from .teachers import patch_grid


def image_distill_loss(
    model: HydraTokModel, teacher: nn.Module, outputs: HydraTokForPreTrainingOutput, pixel_values: Tensor,
    stage: TokenizerStage,
) -> Tensor:  # fmt: skip
    """`distill`: of images, or of the first frames of clips, at the layers that the stage compares."""
    images = pixel_values[:, :, 0] if pixel_values.ndim == 5 else pixel_values
    targets = teacher(model.normalize_pixels(images), stage.distill_layers)
    return distill_loss(outputs.hidden_states, targets, model.get_grid(images), patch_grid(teacher, images))


def video_distill_loss(
    model: HydraTokModel, teacher: nn.Module, outputs: HydraTokForPreTrainingOutput, pixel_values: Tensor
) -> Tensor:
    """`video_distill`: of the frames of clips after the first; 0 for images, with a gradient of 0 for every parameter, which DDP
    waits for."""
    if pixel_values.ndim == 4:
        return 0 * outputs.video_states.float().sum()
    target, teacher_grid = teacher(pixel_values)
    _, height, width = model.get_grid(pixel_values)
    return distill_loss([outputs.video_states], [target], (pixel_values.shape[2] - 1, height, width), teacher_grid)


def check_distill_layers(stage: TokenizerStage, num_layers: int) -> None:
    """Raises ValueError for a layer that a ViT of `num_layers` does not have."""
    layers = stage.compared_layers
    if layers and not 1 <= min(layers) <= max(layers) <= num_layers:
        raise ValueError(f"{stage.distill_layers=} must be blocks 1 to {num_layers} of the ViT.")
