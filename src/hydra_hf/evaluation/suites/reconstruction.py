"""Reconstruction under one protocol: images of ImageNet and COCO, clips of DAVIS and UCF101, or any others. HYDRA, table 1.

The middle square of `size` px (ADM's crop), the mean of the posterior, copies rounded to 8 bits. PSNR and SSIM are means over images or
frames; Frechet distances are between copies and the same crops.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from hydra_hf.modeling import HydraTokModel
from hydra_hf.training.teachers import load_perceptual
from hydra_hf.training.video_teachers import VideoTeacher, load_video_teacher

from ..backbones import InceptionFeatures, PooledFeatures
from ..crops import find_clips, find_images, read_crops
from ..reconstruction import reconstruct_batches, score_reconstructions
from ..report import SuiteResult, package_versions


SIZE = 256  # of the papers
INCEPTION = "inception"


@dataclass(frozen=True)
class Benchmark:
    """Clips or images, and how many there are; None where the papers do not say."""

    is_clips: bool
    number: int | None


BENCHMARKS = {
    "imagenet_256": Benchmark(is_clips=False, number=50_000),
    "coco_2017": Benchmark(is_clips=False, number=5_000),
    "davis": Benchmark(is_clips=True, number=None),
    "ucf": Benchmark(is_clips=True, number=None),
    "images": Benchmark(is_clips=False, number=None),
    "clips": Benchmark(is_clips=True, number=None),
}


class VideoFeatures(nn.Module):
    """Features (B, d) of clips (B, 3, T, H, W) in [-1, 1]: the mean state of a video model of transformers, which sees the frames after
    the first."""

    def __init__(self, backbone: str, tower: HydraTokModel):
        """Raises ValueError if the backbone is not a video model."""
        super().__init__()
        self.model = load_video_teacher(backbone, tower.config)
        if not isinstance(self.model, VideoTeacher):
            raise ValueError(
                f"--backbone {backbone} reads images, expected a video model, such as VideoMAE or V-JEPA 2."
            )
        self.score = f"rfvd/{Path(backbone).name}"

    def forward(self, clips: Tensor) -> Tensor:
        states, _ = self.model(clips.float().clamp(-1, 1))
        return states.mean(dim=1).cpu()


def run(
    vision_tower: HydraTokModel, model: str, *, suite: str, data: Path, limit: int | None = None, size: int = SIZE,
    model_size: int | None = None, num_frames: int = 17, backbone: str | None = None, backbone_weights: str | None = None,
    perceptual_backbone: str | None = None, perceptual_weights: str | None = None, seed: int = 0, batch_size: int = 16,
    num_inference_steps: int | None = None,
) -> SuiteResult:  # fmt: skip
    """Rebuilds the images or clips in the folder `data`.

    `model_size` is what the model sees, for one whose patches do not divide `size`. `backbone` adds a Frechet distance: inception (rFID)
    or timm:NAME for images, a video model's folder or Hub id for clips; `perceptual_backbone` adds LPIPS.
    """
    benchmark = BENCHMARKS[suite]
    num_frames = num_frames if benchmark.is_clips else None
    check_sizes(vision_tower, size, model_size, num_frames)
    device = vision_tower.device
    features = load_features(backbone, backbone_weights, vision_tower, benchmark.is_clips)
    perceptual = load_perceptual(perceptual_backbone, perceptual_weights) if perceptual_backbone else None
    paths = (find_clips if benchmark.is_clips else find_images)(data, limit)
    batches = tqdm(read_crops(paths, size, batch_size, num_frames), total=-(-len(paths) // batch_size), desc="rebuilt")
    pairs = reconstruct_batches(
        vision_tower, (batch.to(device) for batch in batches), seed, num_inference_steps, model_size
    )
    judges = [judge and judge.to(device) for judge in (features, perceptual)]
    scores = score_reconstructions(pairs, judges[0], perceptual=judges[1])
    notes = notes_on(benchmark, len(paths), size, model_size, backbone)
    config = vision_tower.config.decoder_config
    default_steps = config.num_inference_steps if vision_tower.decodes_from_noise else 1
    return SuiteResult(
        suite, model, {f"{suite}/{name}": value for name, value in scores.items()},
        protocol={
            "crop": "ADM, middle square", "size": size, "model_size": model_size or size, "num_frames": num_frames or 1,
            "latents": "mean of the posterior", "num_inference_steps": num_inference_steps or default_steps,
            "rounding": "8 bits", "ssim": "Gaussian window of 11 pixels, sigma 1.5, each channel alone",
            "frechet_backbone": backbone, "perceptual_backbone": perceptual_backbone, "dtype": str(vision_tower.dtype),
        },
        seeds={"seed": seed}, counts={"clips" if benchmark.is_clips else "images": len(paths)},
        is_comparable=not notes, notes=notes,
        versions=package_versions(*(["torch-fidelity"] if backbone == INCEPTION else [])),
    )  # fmt: skip


def load_features(backbone: str | None, weights: str | None, tower: HydraTokModel, is_clips: bool) -> nn.Module | None:
    """The network whose features the Frechet distance compares. Raises ValueError for weights that are not needed or not there."""
    if weights is not None and not (backbone or "").startswith("timm:"):
        raise ValueError(f"--backbone_weights {weights} are for timm:NAME, got --backbone {backbone}.")
    if backbone is None:
        return None
    if is_clips:
        return VideoFeatures(backbone, tower)
    return InceptionFeatures() if backbone == INCEPTION else PooledFeatures(backbone, weights)


def check_sizes(tower: HydraTokModel, size: int, model_size: int | None, num_frames: int | None) -> None:
    """Raises ValueError for what the tokenizer cannot encode."""
    patch, seen = tower.config.patch_size, model_size or size
    if num_frames is not None and not tower.reads_clips:
        raise ValueError("This tokenizer reads images alone, expected a HYDRA-XTok for clips.")
    if num_frames is not None and model_size is not None:
        raise ValueError(f"--model_size {model_size} is for images, clips are seen at --size.")
    if seen < 1 or seen % patch:
        raise ValueError(
            f"The tokenizer's patches of {patch} px do not divide {seen}. Give --model_size, such as"
            f" {max(1, round(1.75 * size / patch)) * patch}: images are resized to it, and copies back to {size}."
        )


def notes_on(benchmark: Benchmark, number: int, size: int, model_size: int | None, backbone: str | None) -> list[str]:
    """Why the scores cannot be compared with published ones; empty if they can."""
    notes = []
    if benchmark.number not in (None, number):
        notes.append(f"{number} images, not all {benchmark.number}.")
    if size != SIZE:
        notes.append(f"Crops of {size} px, not {SIZE}.")
    if model_size not in (None, size):
        notes.append(f"The model sees {model_size} px: other tokenizers spend fewer tokens on {size} px.")
    if backbone not in (None, INCEPTION):
        notes.append(f"The Frechet distance is over {backbone}: compare it only with others over the same.")
    return notes
