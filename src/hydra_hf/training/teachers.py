"""Frozen pretrained networks that judge the vision tower: teachers, and backbones of the perceptual loss. HYDRA, section 3.3.

They belong to the trainer and are never part of a saved model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hydra_hf.evaluation.backbones import freeze, load_strictly, load_timm, load_weights, to_imagenet
from hydra_hf.modeling import HydraTokModel
from hydra_hf.modeling.grid import Grid


class HydraTokTeacher(nn.Module):
    """A HYDRA-TOK checkpoint as the ViT that it was cut from: without a bottleneck, and with the class token in all layers."""

    def __init__(self, model: HydraTokModel):
        super().__init__()
        if model.reads_clips or model.config.rotary_axes:
            raise ValueError("The teacher is a HYDRA-XTok, expected the ViT for images that it was made from.")
        self.patch_size = model.config.patch_size
        self.embeddings = model.gen_vit.embeddings
        self.layers = nn.ModuleList([*model.gen_vit.layers, *model.sem_vit.layers])
        self.post_layernorm = model.sem_vit.post_layernorm

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Outputs (B, cls + N, D) of the blocks `layers`, counted from 1, for normalised pixels (B, 3, H, W); () is the output
        of the whole."""
        _check_layers(layers, len(self.layers))
        hidden_states, outputs = self.embeddings(pixel_values), {}
        for number, layer in enumerate(self.layers[: max(layers, default=None)], start=1):
            outputs[number] = hidden_states = layer(hidden_states)
        return [outputs[number] for number in layers] or [self.post_layernorm(hidden_states)]


class TransformersTeacher(nn.Module):
    """A vision model of transformers, such as InternVLVisionModel or SiglipVisionModel."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.patch_size = model, side_of(model.config.patch_size)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """As `HydraTokTeacher.forward`."""
        outputs = self.model(**self.get_inputs(pixel_values), output_hidden_states=True)
        states = outputs.hidden_states
        _check_layers(layers, len(states) - 1)
        return [states[number] for number in layers] or [outputs.last_hidden_state]

    def get_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixel_values}


class NaflexTeacher(TransformersTeacher):
    """SigLIP2 for any size and aspect ratio (naflex), which reads rows of patches and their grid."""

    def get_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Raises ValueError for sides that are not multiples of the patch size."""
        patch, (height, width) = self.patch_size, pixel_values.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"{height=} and {width=} must be multiples of the teacher's patch size {patch}.")
        patches = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, p)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p p C), the channel last
        grid = torch.tensor([height // patch, width // patch], device=pixel_values.device)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=pixel_values.device),
            "spatial_shapes": grid.expand(len(patches), 2),
        }


class TimmTeacher(nn.Module):
    """A ViT of timm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.patch_size = model, side_of(model.patch_embed.patch_size)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """As `HydraTokTeacher.forward`, without class tokens."""
        _check_layers(layers, len(self.model.blocks))
        if not layers:
            return [self.model.forward_features(pixel_values)]
        return self.model.forward_intermediates(
            pixel_values, indices=[number - 1 for number in layers], output_fmt="NLC", intermediates_only=True
        )


def side_of(size: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square patch or image, which configs write in one number or in two. Raises ValueError for others."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"The teacher's size {size} must be square.")
    return sides.pop()


def patch_grid(teacher: nn.Module, pixel_values: Tensor) -> Grid:
    """The grid of a teacher's patches of images (B, 3, H, W)."""
    height, width = pixel_values.shape[-2:]
    return 1, height // teacher.patch_size, width // teacher.patch_size


def _check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    if layers and not 1 <= min(layers) <= max(layers) <= num_layers:
        raise ValueError(f"distill_layers={layers} must be blocks 1 to {num_layers} of the teacher.")


def load_teacher(teacher: str | Callable[[], nn.Module], weights: str | None = None) -> nn.Module:
    """The frozen teacher in a folder or on the Hub, "timm:NAME" with its safetensors, or the result of a function: a module with
    a `patch_size`, called as `HydraTokTeacher` is.

    Raises ValueError for a model that is not a ViT.
    """
    if callable(teacher):
        return freeze(teacher())
    if teacher.startswith("timm:"):
        model = load_timm(teacher, weights, num_classes=0, dynamic_img_size=True)
        return TimmTeacher(model)
    if weights is not None:
        raise ValueError(f"teacher_weights={weights!r} are for timm:NAME; {teacher!r} has its own.")
    from transformers import AutoModel, Siglip2Model, Siglip2VisionModel, SiglipModel

    model = freeze(AutoModel.from_pretrained(teacher))
    if isinstance(model, HydraTokModel):
        return freeze(HydraTokTeacher(model))
    if isinstance(model, SiglipModel | Siglip2Model):
        model = model.vision_model
    if isinstance(model, Siglip2VisionModel):
        return NaflexTeacher(model)
    if model.main_input_name != "pixel_values" or "patch_size" not in model.config.to_dict():
        raise ValueError(f"The teacher {teacher!r} is a {type(model).__name__}, expected a ViT.")
    return TransformersTeacher(model)


class Lpips(nn.Module):
    """LPIPS of the `lpips` package: its own heads on a trunk with torchvision's weights."""

    def __init__(self, trunk: str, weights: str | None):
        super().__init__()
        import lpips  # pip install hydra_hf[train]

        if trunk not in LPIPS_TRUNKS:
            raise ValueError(
                f"perceptual_backbone='lpips:{trunk}' must be one of {[f'lpips:{t}' for t in LPIPS_TRUNKS]}."
            )
        if weights is None:
            name = LPIPS_TRUNKS[trunk]
            raise ValueError(
                f"LPIPS needs torchvision's {name}. Fetch it once with: python -c 'from torchvision.models import {name};"
                f' from safetensors.torch import save_file; save_file({name}(weights="IMAGENET1K_V1").state_dict(),'
                f' "{name}.safetensors")\' and give it as --perceptual_weights {name}.safetensors'
            )
        self.score = f"lpips_{trunk}"
        self.model = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
        # lpips calls layer i of torchvision's `features` "slice<n>.i"
        names = {name: f"features.{name.split('.', 1)[1]}" for name, _ in self.model.net.named_parameters()}
        found = load_weights(weights)
        trunk_weights = {name: found[theirs] for name, theirs in names.items() if theirs in found}
        load_strictly(self.model.net, trunk_weights, f"{weights} does not hold torchvision's {LPIPS_TRUNKS[trunk]}")
        freeze(self)

    def forward(self, pixel_values: Tensor, targets: Tensor) -> Tensor:
        """Mean LPIPS between images (B, 3, H, W) in [-1, 1], as one number."""
        return self.model(pixel_values, targets).mean()


LPIPS_TRUNKS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


class FeatureDistance(nn.Module):
    """Squared distance between a timm model's feature maps, each normalised over its channels; it is not LPIPS."""

    score = "feature_distance"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, targets: Tensor) -> Tensor:
        """Mean distance between images (B, 3, H, W) in [-1, 1], as one number."""
        pairs = zip(self.features(pixel_values), self.features(targets), strict=True)
        return sum(((first - second) ** 2).sum(1).mean() for first, second in pairs)

    def features(self, pixel_values: Tensor) -> list[Tensor]:
        """Normalised feature maps (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        maps = self.model.forward_intermediates(to_imagenet(pixel_values), intermediates_only=True)
        return [nn.functional.normalize(map, dim=1, eps=1e-6) for map in maps]


def load_perceptual(backbone: str, weights: str | None = None) -> nn.Module:
    """L_perc: the frozen distance between images (B, 3, H, W) in [-1, 1], estimates not clamped, as one number.

    Raises ValueError for another name than lpips:TRUNK or timm:NAME, or for weights that are missing or do not fit.
    """
    kind, _, name = backbone.partition(":")
    if kind == "lpips":
        return Lpips(name, weights)
    return FeatureDistance(load_timm(backbone, weights, num_classes=0))


def blank_perceptual(backbone: str) -> nn.Module:
    """The distance of `load_perceptual` without weights, on torch's meta device; its values are not averaged."""
    kind, _, name = backbone.partition(":")
    with torch.device("meta"):
        if kind == "lpips":
            import lpips

            return freeze(lpips.LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False))
        import timm

        return freeze(FeatureDistance(timm.create_model(name, num_classes=0)))
