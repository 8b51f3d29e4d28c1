"""What a model can do, as far as its files say, and examples of it."""

import os
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from hydra_hf.modeling import HydraProcessor


EXAMPLES_FOLDER = Path(__file__).parents[1] / "assets" / "examples"
CAT_AND_STAR, TWO_APPLES, DOG_ABOVE_CAR, SHAPES, CAT_MOVES = (
    str(EXAMPLES_FOLDER / name)
    for name in ("cat_and_star.png", "two_apples.png", "dog_above_car.png", "shapes.png", "cat_moves_right.mp4")
)
TAGS = {  # task of data/tasks.py -> what a model card's tags call it on the Hub
    "generate": {"text-to-image"},
    "understand": {"visual-question-answering", "image-text-to-text"},
    "edit": {"image-to-image"},
    "depth": {"depth-estimation"},
    "segment": {"image-segmentation"},
    "video_generate": {"text-to-video"},
    "video_understand": {"video-text-to-text"},
}
EXAMPLES = {  # rows of what goes in, a text last; words of the toy world, so that a model of it may know them
    "generate": [["a cat"], ["three apples"], ["a dog left of a car"], ["a red circle and a blue square"]],
    "understand": [
        [CAT_AND_STAR, "is the cat left or right of the star?"],
        [TWO_APPLES, "how many apples are there?"],
        [DOG_ABOVE_CAR, "what is at the top?"],
    ],
    "edit": [
        [CAT_AND_STAR, "remove the star"],
        [CAT_AND_STAR, "replace the cat with a dog"],
        [SHAPES, "change the color of the circle to green"],
    ],
    "video_generate": [["a cat moves to the right"], ["a penguin moves up, then a dog moves to the left"]],
    "video_understand": [[CAT_MOVES, "which way does the cat move?"], [CAT_MOVES, "what moves?"]],
}
PICTURES = [[path] for path in (CAT_AND_STAR, DOG_ABOVE_CAR, SHAPES)]


def examples_of(task: str, processor: HydraProcessor) -> list[list[str]]:
    """The examples of a task all of whose words a model of a small world knows."""
    return [row for row in EXAMPLES.get(task, []) if not processor.unknown_words(row[-1])]


def find_tasks(processor: HydraProcessor, tags: set[str]) -> list[str]:
    """The tasks, in the order of `TAGS`, that a model has the parts and the words for. If the tags of its card name some tasks,
    no others are among them."""
    named = {task for task, names in TAGS.items() if names & tags} or set(TAGS)
    return [
        task
        for task in TAGS
        if task in named
        and (processor.video_token is not None or not task.startswith("video"))
        and (task not in EXAMPLES or examples_of(task, processor))
    ]


def read_tags(model: str) -> set[str]:
    """The tags of the model card of a folder or a repo on the Hub, none if there is no card."""
    if os.path.isdir(model):
        card = Path(model, "README.md")
        return set(ModelCard.load(card).data.tags or ()) if card.is_file() else set()
    try:
        return set(ModelCard.load(model).data.tags or ())
    except EntryNotFoundError:
        return set()
