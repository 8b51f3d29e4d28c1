"""Prompts that ask a model to paint what it sees. UniMRG, section 3.1 and appendix B.4."""

import random
from pathlib import Path


PROMPTS = {
    "reconstruct": (  # our own, in the manner of RecA's: descriptions, orders, questions
        "Generate the original image for the input image.",
        "Draw this image again.",
        "Reproduce the picture exactly as it is.",
        "Make a faithful copy of this photograph.",
        "Show me the same image once more.",
        "Recreate every detail of this picture.",
        "Repeat the image: objects, colors, layout, background.",
        "Paint what you see here, unchanged.",
        "What does this image look like?",
        "Can you draw the same picture for me?",
        "Copy the scene with all of its objects and their places.",
        "Reconstruct this image.",
        "Restore the input image from what you remember of it.",
        "Render this picture again, keeping its style and light.",
        "Look closely and give me the image back.",
        "Return the picture that you were given.",
        "Draw it again, please.",
        "Give an exact visual account of this image.",
        "Repaint the photograph with the same composition and palette.",
        "Describe the whole image in an image.",
    ),
    "depth": (  # the paper's
        "Generate the depth map of this image.",
        "Produce a depth estimation for this image.",
        "Compute the depth map from this photograph.",
        "Extract depth information from this picture.",
        "Show me the depth map.",
        "What is the depth of this image?",
        "Provide the depth estimation.",
        "Perform depth estimation on this image.",
        "Apply monocular depth prediction.",
        "Generate per-pixel depth values.",
    ),
    "segment": (  # the paper's eight, and two more of our choice
        "Generate the segmentation mask of this image.",
        "Create a segmentation map for this image.",
        "Produce a semantic segmentation mask from this image.",
        "Segment this image into different regions.",
        "Predict the object masks in this image.",
        "Compute the segmentation from this photograph.",
        "Produce an object separation mask.",
        "Segment the foreground from background.",
        "Outline every object in this picture.",
        "Show me the boundaries of all objects.",
    ),
}


def choose_prompt(task: str, prompts: tuple[str, ...], *key: int) -> str:
    """One of `prompts`, by a hash of the task and the key, such as (seed, epoch, index): the same in a resumed run."""
    return random.Random(f"{task} {' '.join(map(str, key))}").choice(prompts)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts in a text file, one per line. Raises ValueError for a file that has none or cannot be read."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompts in {path} cannot be read: {error}.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"The file {path} has no prompts, expected one per line.")
    return prompts
