"""Records of edits: source images, an instruction, and the edited image at the size of the source."""

import io
import random

import pytest
import torch
from PIL import Image

from hydra_hf.data.edits import one_edit
from hydra_hf.data.readers import TaskReader
from hydra_hf.data.records import RecordReader, UnreadableRecordError, find_columns
from hydra_hf.data.sources import Source
from hydra_hf.data.tasks import TASKS, images_of, videos_of, visuals_of
from hydra_hf.modeling import HydraImageProcessor, HydraProcessor


@pytest.fixture
def processor(tiny_tokenizer):
    size = {"min_pixels": 64, "max_pixels": 64 * 64}
    return HydraProcessor(HydraImageProcessor(size=size, patch_size=8), tiny_tokenizer, patch_size=8)


@pytest.fixture
def read(processor, tmp_path):
    """A function that makes a sample of a record."""

    def read(record: dict, seed: int = 0):
        columns = find_columns(set(record), class_names=())
        return RecordReader(columns, tmp_path, processor.image_processor).sample(record, "edit", random.Random(seed))

    return read


def drawn(sample, number_in) -> list[str]:
    """Turns as "role: parts", an image as # with its number."""
    return [
        f"{message['role']}: "
        + " ".join(f"#{number_in(p['image'])}" if p["type"] == "image" else p["text"] for p in message["content"])
        for message in sample.messages
    ]


def noisy_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PUBLIC = {  # columns as public data sets name them
    "InstructPix2Pix": ("original_image", "edit_prompt", "edited_image"),
    "UltraEdit": ("source_image", "edit_prompt", "edited_image"),
    "MagicBrush": ("source_img", "instruction", "target_img"),
    "OmniEdit": ("src_img", "edited_prompt_list", "edited_img"),
    "HQ-Edit": ("input_image", "edit", "output_image"),
    "a tar": ("source.png", "txt", "target.png"),
}


@pytest.mark.parametrize("names", PUBLIC.values(), ids=PUBLIC)
def test_an_edit_is_read_by_the_names_of_public_data_sets(read, files, number_in, names):
    source, instruction, target = names
    record = {source: files.png(1), instruction: "make it lighter", target: files.png(9)}
    assert drawn(read(record), number_in) == ["user: #1 make it lighter", "assistant: #9"]


def test_one_of_several_instructions_is_chosen_by_chance(read, files, number_in):
    record = {"src_img": files.png(1), "edited_prompt_list": ["lighter", "", "brighter"], "edited_img": files.png(9)}
    asked = {drawn(read(record, seed), number_in)[0] for seed in range(20)}
    assert asked == {"user: #1 lighter", "user: #1 brighter"}


def test_a_conversation_in_which_the_assistant_draws_is_an_edit(read, files, number_in):
    turns = [{"from": "human", "value": "<image>\nmake it lighter"}, {"from": "gpt", "value": "Here it is: <image>"}]
    record = {"conversations": turns, "image": [files.png(1), files.png(9)]}
    assert drawn(read(record), number_in) == ["user: #1 make it lighter", "assistant: #9"]


def test_an_edit_of_a_dialogue_starts_from_the_image_before_it(read, files, number_in):
    turns = [("human", "<image> lighter"), ("gpt", "<image>"), ("human", "and lighter"), ("gpt", "<image>"),
             ("human", "thanks"), ("gpt", "you are welcome")]  # fmt: skip
    record = {"conversations": [{"from": role, "value": text} for role, text in turns],
              "images": [files.png(n) for n in (1, 5, 9)]}  # fmt: skip
    edits = {tuple(drawn(read(record, seed), number_in)) for seed in range(20)}
    assert edits == {("user: #1 lighter", "assistant: #5"), ("user: #5 and lighter", "assistant: #9")}


def test_several_sources_keep_their_order_and_the_last_one_has_the_size_of_the_target(read, files, number_in):
    record = {
        "input_images": [files.png(3, (16, 48)), files.png(1, (96, 64))],
        "instruction": "put them together",
        "output_image": files.png(9, (48, 32)),
    }
    sample = read(record)
    assert drawn(sample, number_in) == ["user: #3 #1 put them together", "assistant: #9"]
    other, source, target = (part["image"].shape[1:] for part in images_of(sample.messages))
    assert source == target
    assert other[0] == 3 * other[1]  # seen whole


@pytest.mark.parametrize("size", [(100, 60), (64, 64), (50, 90)])
def test_source_and_target_are_cut_as_generated_images_are_bit_for_bit(read, processor, size):
    contents = [noisy_png(*size), noisy_png(*(2 * side for side in size))]
    record = {"source_image": contents[0], "instruction": "a", "target_image": contents[1]}
    source, target = (part["image"] for part in images_of(read(record).messages))
    asked = [processor.image_processor.generated_levels(Image.open(io.BytesIO(content))) for content in contents]
    assert source.dtype == torch.uint8
    assert torch.equal(source, asked[0])
    assert torch.equal(target, asked[1])


def test_the_target_decides_the_grid_when_the_source_alone_would_have_another(read, processor):
    sizes = [(115, 100), (112, 100)]  # at the border between two aspect ratios
    own = [processor.image_processor.generated_size(height, width) for width, height in sizes]
    assert own[0] != own[1]
    record = {"source_image": noisy_png(*sizes[0]), "instruction": "a", "target_image": noisy_png(*sizes[1])}
    source, target = (part["image"] for part in images_of(read(record).messages))
    assert source.shape[1:] == target.shape[1:] == own[1]


def test_what_is_wrong_with_a_record_is_said(read, files):
    source, target, text = files.png(1), files.png(9), "make it lighter"
    wide = files.png(9, (18, 16))
    turns = [{"from": "human", "value": "make it lighter"}, {"from": "gpt", "value": "<image>"}]
    for record, reason in [
        ({"source_image": None, "instruction": text, "target_image": target}, "no source image"),
        ({"source_image": source, "instruction": text, "target_image": None}, "no target image"),
        ({"source_image": source, "instruction": " ", "target_image": target}, "no instruction"),
        ({"source_image": source, "instruction": None, "target_image": target}, "no instruction"),
        ({"source_image": source, "instruction": ["", None], "target_image": target}, "no instruction"),
        ({"source_image": source, "instruction": 7, "target_image": target}, "an instruction of type int"),
        ({"source_image": b"junk", "instruction": text, "target_image": target}, "a source image that cannot be decoded"),
        ({"source_image": source, "instruction": text, "target_image": b"junk"}, "a target image that cannot be decoded"),
        ({"source_image": "a.png", "instruction": text, "target_image": target}, "an image file that is not there"),
        ({"source_image": source, "instruction": text, "target_image": [target] * 2}, "more than one target image"),
        ({"source_image": source, "instruction": text, "target_image": wide}, "aspect differs by more than 5% from"),
        ({"source_image": [source] * 16, "instruction": text, "target_image": target}, "more than 16 images"),
        ({"conversations": turns, "image": [target]}, "no source image"),
        ({"conversations": turns[:1] + [{"from": "gpt", "value": "no"}], "image": []}, "no target image"),
    ]:  # fmt: skip
        with pytest.raises(UnreadableRecordError, match=reason):
            read(record)


def test_aspects_that_differ_by_a_rounded_pixel_are_one_aspect(read, files):
    record = {"source_image": files.png(1, (64, 64)), "instruction": "a", "target_image": files.png(9, (64, 62))}
    source, target = (part["image"].shape for part in images_of(read(record).messages))
    assert source == target


def test_prompts_are_dropped_with_the_source_and_without_it(cache, files, processor, tmp_path, number_in):
    folder = files.folder_of([1, 9])
    path = files.jsonl([{"source_image": "001.png", "instruction": "lighter", "target_image": "009.png"}])
    source = (Source(task="edit", path=str(path), image_root=str(folder)),)
    reader = TaskReader(source, processor, 0, max_length=4096, drop_prompt=0.5)
    asked = [drawn(sample, number_in)[0] for sample in reader.batch(range(400))]
    counts = {text: asked.count(text) for text in set(asked)}
    assert counts.keys() == {"user: #1 lighter", "user: #1 ", "user: "}
    assert 170 < counts["user: #1 lighter"] < 230
    assert all(70 < counts[text] < 130 for text in ("user: #1 ", "user: "))


def test_only_an_edit_links_its_source():
    assert [name for name, task in TASKS.items() if task.links_source] == ["edit"]


def test_visuals_are_images_and_clips_in_their_order():
    parts = [{"type": kind, kind: index} for index, kind in enumerate(("image", "text", "video", "image"))]
    messages = [{"role": "user", "content": parts[:2]}, {"role": "assistant", "content": parts[2:]}]
    assert visuals_of(messages) == [parts[0], parts[2], parts[3]]
    assert images_of(messages) == [parts[0], parts[3]]
    assert videos_of(messages) == [parts[2]]


def test_the_first_edit_of_a_dialogue_is_taken_without_a_generator():
    image = [{"type": "image", "image": n} for n in range(3)]
    text = {"type": "text", "text": "lighter"}
    turns = [("user", [image[0], text]), ("assistant", [image[1]]), ("user", [text]), ("assistant", [image[2]])]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert one_edit(messages, None) == messages[:2]
