"""The table of tasks: one row says how a task is read, what it generates and what it scores."""

import pytest
import torch

from hydra_hf.data.collate import collate
from hydra_hf.data.sample import Sample
from hydra_hf.data.sources import Source
from hydra_hf.data.tasks import TASKS, check_task, task_number, videos_of


IMAGE_TASKS = [name for name, task in TASKS.items() if not {"video"} & {*task.user, *task.assistant}]


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_a_blank_sample_has_the_targets_that_the_row_says(name, tiny_processor):
    size = tiny_processor.image_processor.size
    messages = TASKS[name].blank_messages(torch.zeros(3, size["height"], size["width"]))
    batch = collate([Sample(task=name, messages=messages)], tiny_processor)
    labels = batch["labels"][batch["labels"] != -100].tolist()
    start = tiny_processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert (start in labels) == TASKS[name].generates
    assert any(label != start for label in labels) == TASKS[name].scores_text
    is_generated = batch.get("is_generated", torch.tensor([]))
    assert len(is_generated) == TASKS[name].num_images
    assert bool(is_generated.any()) == TASKS[name].generates


def test_rows_keep_their_numbers_since_noise_depends_on_them():
    names = ["text", "understand", "generate", "reconstruct", "depth", "segment", "edit", "video_understand",
             "video_generate", "interleave"]  # fmt: skip
    assert [task_number(name) for name in names] == list(range(10))


def test_a_name_that_is_no_task_is_refused():
    with pytest.raises(ValueError, match=r"A stage has task='paint', expected one of \['text', 'understand'"):
        check_task("paint", "A stage")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_data_sets(name):
    assert Source(task=name, path="a.jsonl").task == name


@pytest.mark.parametrize("name", ["video_understand", "video_generate"])
def test_a_blank_clip_is_the_image_as_one_frame(name):
    messages = TASKS[name].blank_messages(torch.zeros(3, 8, 16))
    assert [part["video"].shape for part in videos_of(messages)] == [(3, 1, 8, 16)]
    assert TASKS[name].num_videos == 1
