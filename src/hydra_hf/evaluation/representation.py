"""How alike two sets of features are (CKNNA), and pictures of them (t-SNE). HYDRA, appendices C.3, C.4 and F.2."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hydra_hf.files import write_file
from hydra_hf.modeling import HydraTokModel


CHUNK = 1024  # rows of a kernel at once


def cknna(features: Tensor, others: Tensor, num_neighbors: int = 10) -> float:
    """
    Alignment of two feature sets (n, d) and (n, e) of the same inputs on their mutual nearest neighbours; 1 is identical.

    HYDRA, eq. 12-17: linear kernels, whose rows are centred; a pair (i, j) counts if j is among the `num_neighbors` nearest
    of i under both kernels. Features are scaled to length 1 first (our choice, after Huh et al. and REPA).
    Raises ValueError for another rank, features that are not of the same inputs or not finite, or too few of them.
    """
    if features.ndim != 2 or others.ndim != 2 or len(features) != len(others):
        raise ValueError(f"Features {tuple(features.shape)} and {tuple(others.shape)} must be (n, d) and (n, e).")
    if not 1 <= num_neighbors < len(features):
        raise ValueError(f"{num_neighbors=} must be at least 1 and below the {len(features)} inputs.")
    if not (features.isfinite().all() and others.isfinite().all()):
        raise ValueError("The features are not finite.")
    sets = [torch.nn.functional.normalize(values.double(), dim=1) for values in (features, others)]
    sums = torch.zeros(3, dtype=torch.float64, device=features.device)
    for rows in torch.arange(len(features), device=features.device).split(CHUNK):
        sums += _local_alignment(*(_centred_rows(values, rows, num_neighbors) for values in sets))
    cross, first, second = sums.tolist()
    return cross / (first * second) ** 0.5 if first * second > 0 else 0.0


def _centred_rows(features: Tensor, rows: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """These rows (r, n) of the linear kernel, centred, and the mask of each row's nearest neighbours, itself excluded."""
    kernel = features[rows] @ features.T
    nearest = kernel.scatter(1, rows[:, None], -torch.inf).topk(num_neighbors, dim=1).indices
    is_near = torch.zeros_like(kernel, dtype=torch.bool).scatter(1, nearest, True)
    return kernel - kernel.mean(dim=1, keepdim=True), is_near


def _local_alignment(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Sums over pairs that are near under both kernels, and under each of the two alone, (3,)."""
    (kernel, is_near), (other, is_other_near) = first, second
    return torch.stack([
        (kernel * other)[is_near & is_other_near].sum(),
        (kernel**2)[is_near].sum(),
        (other**2)[is_other_near].sum(),
    ])  # fmt: skip


@torch.no_grad()
def layer_features(model: HydraTokModel, pixel_values: Tensor) -> dict[str, Tensor]:
    """Means over patches (B, D), in fp32, for images (B, 3, H, W) in [-1, 1].

    `layer_1` and so on are the outputs of the layers of Gen-ViT, then of Sem-ViT; `generation` is the bottleneck's mean, what
    HYDRA generates, and `understanding` the output of Sem-ViT, what it reads (our choice: the paper does not say which).
    """
    output = model(pixel_values.to(model.device, model.dtype), output_hidden_states=True)
    states = {f"layer_{number}": values for number, values in enumerate(output.hidden_states) if number > 0}
    states |= {"generation": output.mean, "understanding": output.last_hidden_state}
    return {name: patch_mean(values, output.mean.shape[1]) for name, values in states.items()}


def patch_mean(states: Tensor, num_patches: int) -> Tensor:
    """The mean (B, D) of the last `num_patches` of states (B, cls + N, D), in fp32."""
    return states[:, -num_patches:].float().mean(dim=1).cpu()


def write_tsne(path: Path, features: dict[str, Tensor], labels: Sequence[str], seed: int = 0) -> None:
    """Writes a picture with a t-SNE map of each feature set (n, d), coloured by label. Raises ImportError without the extra."""
    try:
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn and matplotlib: pip install hydra_hf[eval].") from error

    names = sorted(set(labels))
    perplexity = min(30.0, (len(labels) - 1) / 3)
    figure = Figure(figsize=(5 * len(features) + 2, 5), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(1, len(features), squeeze=False)[0], features.items()):
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values.numpy())
        for number, name in enumerate(names):
            rows = [row for row, label in enumerate(labels) if label == name]
            marker = "osD^v"[number // 10 % 5]
            axis.scatter(*places[rows].T, s=14, color=f"C{number % 10}", marker=marker, label=name)
        axis.set(title=title, xticks=[], yticks=[])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    write_file(path, figure.savefig)
