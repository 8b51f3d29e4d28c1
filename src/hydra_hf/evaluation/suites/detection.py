"""Objects of an image and their colours, found by Mask2Former and CLIP of transformers, with GenEval's settings."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .geneval import COLORS


GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO -> GenEval
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GRAY = (153, 153, 153)  # around an object whose colour is asked for


@dataclass(frozen=True)
class Found:
    """An object: box (left, top, right, bottom) in pixels, confidence, mask (H, W) of bool."""

    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray


class Detector:
    """Instance segmentation with the classes of COCO, under GenEval's names."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model = AutoModelForUniversalSegmentation.from_pretrained(name).to(device).eval()
        self.names = {
            int(index): GENEVAL_NAMES.get(label, label) for index, label in self.model.config.id2label.items()
        }

    @torch.no_grad()
    def __call__(self, image: Image.Image, threshold: float) -> dict[str, list[Found]]:
        """Objects surer than `threshold` by class, the surest first."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        (result,) = self.processor.post_process_instance_segmentation(
            self.model(**inputs),
            threshold=threshold,
            target_sizes=[(image.height, image.width)],
            return_binary_maps=True,
        )
        objects = {}
        if result["segments_info"]:
            for info, mask in zip(result["segments_info"], np.asarray(result["segmentation"].cpu()).astype(bool)):
                if mask.any():
                    objects.setdefault(self.names[info["label_id"]], []).append(
                        Found(_box_of(mask), info["score"], mask)
                    )
        return {name: sorted(found, key=lambda thing: -thing.confidence) for name, found in objects.items()}


class ColorClassifier:
    """The nearest of GenEval's ten colours, by CLIP, of an object that is cut out along its mask."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoModel, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).to(device).eval()
        self.embeddings = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, objects: list[Found], class_name: str) -> list[str]:
        blank, crops = Image.new("RGB", image.size, GRAY), []
        for found in objects:
            left, top, right, bottom = found.box
            shown = Image.composite(image, blank, Image.fromarray(found.mask))
            crops.append(
                shown.crop((int(left), int(top), max(int(right), int(left) + 1), max(int(bottom), int(top) + 1)))
            )
        inputs = self.processor(images=crops, return_tensors="pt").to(self.model.device)
        features = _unit(self.model.get_image_features(**inputs))
        return [COLORS[index] for index in (features @ self.colors_of(class_name).T).argmax(-1).tolist()]

    def colors_of(self, class_name: str) -> torch.Tensor:
        """Embeddings (10, D) of the colours of a class, each the mean over the templates."""
        if class_name not in self.embeddings:
            texts = [template.format(color, class_name) for color in COLORS for template in TEMPLATES]
            inputs = self.processor(text=texts, return_tensors="pt", padding=True).to(self.model.device)
            features = _unit(self.model.get_text_features(**inputs))
            self.embeddings[class_name] = _unit(features.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1))
        return self.embeddings[class_name]


def _unit(output) -> torch.Tensor:
    """Rows of length 1; newer versions of transformers wrap the features."""
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
