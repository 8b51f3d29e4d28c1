"""Frozen teachers of clips: what the decompressed states of the frames after the first should be. HYDRA-X, section 2.

They belong to the trainer and are never part of a saved model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hydra_hf.evaluation.backbones import freeze, to_imagenet
from hydra_hf.modeling import HydraTokConfig
from hydra_hf.modeling.grid import Grid

from .losses import frames_of, patch_states
from .teachers import load_teacher, patch_grid, side_of


class VideoTeacher(nn.Module):
    """A video model of transformers with a state for each tubelet, frame by frame: VideoMAE, V-JEPA 2, ViViT.

    It sees the frames after the first one (our choice), in its own size and in ImageNet's statistics, which all of these use.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        from transformers import VJEPA2Model

        self.model, fields = model, model.config.to_dict()
        tubelet = fields["tubelet_size"]
        self.tubelet, self.patch_size = (
            (tubelet, side_of(fields["patch_size"])) if isinstance(tubelet, int) else tubelet[:2]
        )
        self.image_size = side_of(fields["crop_size"] if "crop_size" in fields else fields["image_size"])
        self.num_frames = fields.get("num_frames")  # None for any number
        self.options = {"skip_predictor": True} if isinstance(model, VJEPA2Model) else {}

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        """States (B, N, D) of clips (B, 3, 1 + T, H, W) in [-1, 1], and their grid (t, h, w).

        Raises ValueError for a number of frames that the teacher does not read.
        """
        frames = pixel_values[:, :, 1:]
        num_frames, size = frames.shape[2], (self.image_size, self.image_size)
        if num_frames % self.tubelet or self.num_frames not in (None, num_frames):
            expected = self.num_frames or f"a multiple of {self.tubelet}"
            raise ValueError(f"The video teacher reads {expected} frames, got {num_frames} after the first.")
        images = nn.functional.interpolate(
            frames_of(frames), size=size, mode="bilinear", align_corners=False, antialias=True
        )
        clips = to_imagenet(images).unflatten(0, (-1, num_frames))  # (B, T, 3, H, W)
        states = self.model(**{self.model.main_input_name: clips}, **self.options).last_hidden_state
        side = self.image_size // self.patch_size
        grid = (num_frames // self.tubelet, side, side)
        return patch_states(states, grid[0] * side * side), grid


class FrameTeacher(nn.Module):
    """A teacher of images on each frame after the first, for comparison with a video teacher."""

    def __init__(self, teacher: nn.Module, config: HydraTokConfig):
        super().__init__()
        self.teacher, self.statistics = teacher, (config.image_mean, config.image_std)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        """As `VideoTeacher.forward`."""
        images = frames_of(pixel_values[:, :, 1:])
        mean, std = (images.new_tensor(values)[:, None, None] for values in self.statistics)
        (states,) = self.teacher(((images + 1) / 2 - mean) / std, ())
        _, height, width = patch_grid(self.teacher, images)
        states = patch_states(states, height * width).unflatten(0, (len(pixel_values), -1))
        return states.flatten(1, 2), (states.shape[1], height, width)


def load_video_teacher(teacher: str | Callable[[], nn.Module], config: HydraTokConfig) -> nn.Module:
    """The frozen teacher in a folder or on the Hub, timm:NAME, or the result of a function: a module that is called as
    `VideoTeacher` is. One of images teaches frame by frame.

    Args:
        config: of the student, in whose statistics a teacher of images gets its pixels.
    """
    from transformers import AutoConfig, AutoModel

    if callable(teacher):
        return freeze(teacher())
    if not teacher.startswith("timm:") and "tubelet_size" in AutoConfig.from_pretrained(teacher).to_dict():
        return freeze(VideoTeacher(AutoModel.from_pretrained(teacher)))
    return freeze(FrameTeacher(load_teacher(teacher), config))
