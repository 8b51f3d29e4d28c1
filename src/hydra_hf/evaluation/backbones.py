"""Frozen pretrained networks that judge images, read from safetensors."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from .metrics import to_8_bits


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_imagenet(pixel_values: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to ImageNet's statistics, without clamping."""
    mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixel_values + 1) / 2 - mean) / std


def load_weights(path: str) -> dict[str, Tensor]:
    """A state dict. Raises ValueError that says what to do if the file is missing or not safetensors."""
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"{path} must be a .safetensors file. Convert a state dict once with: python -c 'import torch; from"
            f' safetensors.torch import save_file; save_file(torch.load("{path}", weights_only=True),'
            f' "{Path(path).with_suffix(".safetensors")}")\''
        )
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}; expected weights in safetensors.")
    return load_file(path)


def load_timm(name: str, weights: str | None, **kwargs) -> nn.Module:
    """The frozen timm model `name`, "timm:NAME"; without `weights`, timm downloads its own.

    Raises ValueError if timm has no such model, or if the weights do not fit it.
    """
    import timm  # pip install hydra_hf[train]

    architecture = name.removeprefix("timm:")
    if not name.startswith("timm:") or not timm.is_model(architecture):
        raise ValueError(f"{name!r} must be timm:NAME with a model that timm has; see timm.list_models().")
    if weights is None:
        model = timm.create_model(architecture, pretrained=True, **kwargs)
    else:
        model = timm.create_model(architecture, **kwargs)
        load_strictly(model, load_weights(weights), f"{weights} does not hold timm's {architecture}")
    return freeze(model)


def load_strictly(model: nn.Module, weights: dict[str, Tensor], complaint: str) -> None:
    """Loads all of `model` from `weights`, which may hold more (a classifier, unused layers).

    Raises ValueError with `complaint` if they do not fit.
    """
    wanted = {name for name, _ in model.named_parameters()}
    wanted |= {name for name, _ in model.named_buffers() if not name.endswith("num_batches_tracked")}
    if missing := sorted(wanted - set(weights)):
        raise ValueError(f"{complaint}: {len(missing)} of {len(wanted)} are missing, such as {missing[:3]}.")
    try:
        model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{complaint}: {error}") from error


def freeze(model: nn.Module) -> nn.Module:
    """The model in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


class PooledFeatures(nn.Module):
    """Global features (B, d) of a timm model, for a Frechet distance; `score` is the name of that number."""

    def __init__(self, backbone: str, weights: str | None):
        super().__init__()
        self.score = f"frechet/{backbone.removeprefix('timm:')}"
        self.model = load_timm(backbone, weights, num_classes=0)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], clamped -> features (B, d)."""
        return self.model(to_imagenet(pixel_values.float().clamp(-1, 1)))


class InceptionFeatures(nn.Module):
    """Features (B, 2048) of FID's Inception, as torch-fidelity has it: their Frechet distance is FID."""

    score = "rfid"

    def __init__(self):
        """Raises ImportError without torch-fidelity, ValueError if its weights are not there or damaged."""
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError as error:
            raise ImportError("rFID needs torch-fidelity: pip install hydra_hf[eval].") from error
        url = inception.URL_INCEPTION_V3
        path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        check_hashed_file(path, url)
        self.model = freeze(inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)))

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], rounded to 8 bits -> features (B, 2048)."""
        return self.model((to_8_bits(pixel_values) * 255).round().to(torch.uint8))[0]


def check_hashed_file(path: Path, url: str) -> None:
    """Raises ValueError if there is no file at `path`, or not the one whose SHA-256 begins as its name ends, as in torch.hub."""
    command = f"curl -L --create-dirs -o {path} {url}"
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Fetch it once with: {command}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected := path.stem.rpartition("-")[2]):
        raise ValueError(f"{path} has the SHA-256 {digest}, expected {expected}... Fetch it again with: {command}")
