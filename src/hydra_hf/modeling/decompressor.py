"""Decompressor: semantic states of a clip's latent frames back to its frames, for a video teacher. HYDRA-X, section 2.

It belongs to training and is not saved with a model.
"""

from copy import deepcopy

from torch import Tensor, nn

from .configuration_hydra import HydraTokConfig
from .grid import Grid
from .layers import ViTLayer
from .temporal import FrameLayout, TemporalUnfold, run_layers


class Decompressor(nn.Module):
    """Once for each fold: one frame becomes two, then a transformer layer; at last the width of the teacher.

    Its attention is full (our choice), since the teacher's is, and no frame comes out of the anchor, which has an image teacher.
    """

    def __init__(self, config: HydraTokConfig, teacher_size: int):
        super().__init__()
        self.config = deepcopy(config)
        self.config.temporal_attention = "full"
        num_folds = len(config.temporal_fold_layers)
        self.unfolds = nn.ModuleDict({str(index): TemporalUnfold(config.hidden_size, 2) for index in range(num_folds)})
        self.layers = nn.ModuleList([ViTLayer(self.config) for _ in range(num_folds)])
        self.head = nn.Linear(config.hidden_size, teacher_size)

    def forward(self, semantic_states: Tensor, grid: Grid) -> Tensor:
        """`semantic_states` (B, N, D) of a clip with 1 + n latent frames -> (B, 4n h w, D_teacher), the 4n frames after the
        anchor."""
        num_frames, height, width = grid
        layout = FrameLayout(((num_frames - 1, height, width),), start=1)
        hidden_states, _ = run_layers(self, self.unfolds, semantic_states[:, height * width :], layout)
        return self.head(hidden_states)
