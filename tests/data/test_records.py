import base64
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.data.collate import collate
from hydra_hf.data.records import MAX_CHARACTERS, RecordReader, UnreadableRecordError, find_columns
from hydra_hf.modeling import HydraImageProcessor, HydraProcessor
from hydra_hf.modeling.image_processing_hydra import as_pixel_values, packed_pixel_values


@pytest.fixture
def read(tiny_processor, tmp_path):
    """A function that makes a sample of a record."""

    def read(record: dict, task: str = "understand"):
        columns = find_columns(set(record), class_names=())
        return RecordReader(columns, tmp_path, tiny_processor.image_processor).sample(record, task)

    return read


def drawn(sample) -> list[str]:
    """Turns as "role: parts", an image as #."""
    return [
        f"{message['role']}: {' '.join('#' if part['type'] == 'image' else part['text'] for part in message['content'])}"
        for message in sample.messages
    ]


def llava(*values: str, **columns) -> dict:
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"conversations": turns, **columns}


def test_a_caption_is_what_an_image_is_drawn_from(read, files):
    sample = read({"image": files.png(1), "caption": " a cat\n"}, "generate")
    assert drawn(sample) == ["user: a cat", "assistant: #"]
    assert sample.messages[1]["content"][0]["image"].shape == (3, 32, 32)


def test_a_caption_is_what_an_image_is_described_by(read, files):
    assert drawn(read({"image": files.png(1), "text": "a cat"})) == [
        "user: # Describe the image.",
        "assistant: a cat",
    ]


def test_pixels_are_levels_until_they_are_on_the_device(read, files):
    sample = read({"image": files.png(5), "caption": "grey"}, "generate")
    image = sample.messages[1]["content"][0]["image"]
    assert torch.equal(image, torch.full((3, 32, 32), 50, dtype=torch.uint8))
    torch.testing.assert_close(as_pixel_values(image), torch.full((3, 32, 32), 50 / 127.5 - 1))


def test_a_picture_of_fractions_of_levels_keeps_them_next_to_one_of_levels(tiny_processor, files):
    Image.fromarray(np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)).save(files.folder / "a.tif")
    (files.folder / "b.png").write_bytes(files.png(5))
    record = llava("<image> <image>", "a cat", image=["a.tif", "b.png"])
    reader = RecordReader(find_columns(set(record), ()), files.folder, tiny_processor.image_processor)
    batch = collate([reader.sample(record, "understand")], tiny_processor)
    pictures = [Image.open(files.folder / name) for name in ("a.tif", "b.png")]
    asked = tiny_processor.image_processor(pictures, return_tensors="pt")
    assert torch.equal(packed_pixel_values(batch["pixel_values"]), asked["pixel_values"])
    assert len(asked["pixel_values"].unique()) > 300


def test_a_processor_that_does_not_give_minus_one_to_one_is_refused():
    with pytest.raises(ValueError, match=r"has image_mean=.*0.4.*, expected .*0.5.* for training"):
        RecordReader(find_columns(set(), ()), Path(), HydraImageProcessor(image_mean=[0.4] * 3))


def test_a_conversation_keeps_its_turns_and_the_places_of_its_images(read, files):
    record = llava("<image>\nwhat?", "a cat", "and <image> here?", "a dog", image=[files.png(1), files.png(9)])
    sample = read(record)
    assert drawn(sample) == ["user: # what?", "assistant: a cat", "user: and # here?", "assistant: a dog"]
    first, second = sample.messages[0]["content"][0]["image"], sample.messages[2]["content"][1]["image"]
    assert first.max() < second.min()


def test_messages_in_the_form_of_openai_are_read(read, files):
    url = "data:image/png;base64," + base64.b64encode(files.png(1)).decode()
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a cat"},
    ]
    assert drawn(read({"messages": messages})) == ["system: be brief", "user: what? #", "assistant: a cat"]


def test_image_parts_without_an_image_take_those_of_the_column(read, files):
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    assert drawn(read({"messages": messages, "images": [files.png(1)]})) == ["user: # what?", "assistant: a cat"]


def test_lists_that_datasets_has_turned_into_strings_are_read(read, files):
    files.folder_of([1, 2], "a")
    record = llava("<image><image> what?", "a cat", image='["a/001.png","a/002.png"]')
    assert drawn(read(record)) == ["user: # # what?", "assistant: a cat"]
    record = llava('[{"type":"text","text":"what?"}]', "a cat")
    assert drawn(read(record, "text")) == ["user: what?", "assistant: a cat"]
    assert drawn(read(llava('[{"type": once', "a cat"), "text"))[0] == 'user: [{"type": once'


def test_a_photograph_that_lies_on_its_side_is_turned_before_it_is_cut(read):
    picture = Image.new("RGB", (32, 64), "black")
    picture.paste("white", (0, 0, 32, 32))  # turned by 90 degrees: right half white
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(buffer, "PNG", exif=exif)
    image = read({"image": buffer.getvalue(), "caption": "half"}, "generate").messages[1]["content"][0]["image"]
    assert image[:, :, :12].max() < 13
    assert image[:, :, 20:].min() > 242


def wide_picture() -> Image.Image:
    picture = Image.effect_noise((1600, 800), 80).convert("RGB")
    picture.paste("red", (0, 0, 400, 800))
    return picture


def palette_picture() -> Image.Image:
    picture = Image.effect_noise((90, 70), 80).convert("P")
    picture.info["transparency"] = 40
    return picture


def turned_picture() -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return wide_picture().resize((300, 100)), {"exif": exif}


PICTURES = {
    "wide": lambda: (wide_picture(), {}),
    "tall": lambda: (wide_picture().rotate(90, expand=True), {}),
    "palette with transparency": lambda: (palette_picture(), {"transparency": 40}),
    "16 bits": lambda: (Image.fromarray(np.linspace(0, 65535, 50 * 60).reshape(50, 60).astype(np.uint16)), {}),
    "turned by its camera": turned_picture,
}


@pytest.mark.parametrize("size", [{"height": 32, "width": 32}, {"min_pixels": 64, "max_pixels": 128 * 128}])
@pytest.mark.parametrize("name", PICTURES)
def test_what_training_encodes_of_a_file_is_what_the_processor_gives_bit_for_bit(tiny_tokenizer, files, name, size):
    picture, options = PICTURES[name]()
    path = files.folder / "picture.png"
    picture.save(path, **options)
    processor = HydraProcessor(HydraImageProcessor(size=size, patch_size=8), tiny_tokenizer, patch_size=8)
    record = llava("<image>\nwhat is in the picture", "a cat", image="picture.png")
    sample = RecordReader(find_columns(set(record), ()), files.folder, processor.image_processor).sample(
        record, "understand"
    )
    trained = collate([sample], processor)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "what is in the picture"}],
        }
    ]
    asked = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert trained["pixel_values"].dtype == torch.uint8
    assert torch.equal(packed_pixel_values(trained["pixel_values"]), asked["pixel_values"])
    assert torch.equal(trained["image_grid_thw"], asked["image_grid_thw"])
    length = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :length], asked["input_ids"])


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "record, task, reason",
    [
        ({"image": b"junk", "caption": "a"}, "generate", "an image that cannot be decoded"),
        ({"image": "missing.png", "caption": "a"}, "generate", "an image file that is not there"),
        ({"image": "http://a.b/c.png", "caption": "a"}, "generate", "neither bytes nor a path"),
        ({"image": 3, "caption": "a"}, "generate", "neither bytes nor a path"),
        ({"image": None, "caption": "a"}, "generate", "no image"),
        ({"image": [b"1", b"2"], "caption": "a"}, "generate", "more than one image"),
        ({"image": b"", "caption": " "}, "generate", "no caption"),
        ({"image": b"", "caption": None}, "understand", "no image"),
        ({"image": b"1", "caption": None}, "understand", "no caption"),
        ({"image": b"1", "caption": "a" * (MAX_CHARACTERS + 1)}, "generate", "more than 32768 characters"),
        (llava("what?", "a cat"), "understand", "no image"),
        (llava("<image>", "a cat", image=b"1"), "text", "images in a sample of text"),
        (llava("<image>", "a cat"), "understand", "not as many images as placeholders"),
        (llava("what?", "a cat", image=b"1"), "understand", "not as many images as placeholders"),
        (llava("<image>", "a cat", image=[b"1", b"2"]), "understand", "not as many images as placeholders"),
        (llava("<image>" * 17, "a", image=[b"1"] * 17), "understand", "more than 16 images"),
        (llava("draw", "<image>", image=b"1"), "understand", "an image outside the user's turns"),
        (llava("what?"), "text", "no turn of an assistant"),
        (llava("what?", " "), "text", "an empty turn"),
        (llava("what?", None), "text", "an empty turn"),
        ({"conversations": []}, "text", "no turns"),
        ({"conversations": ["what?"]}, "text", "a turn that is not a dict"),
        (llava("what?", 7), "text", "a turn whose content is a int"),
        (llava("what?", {"text": "a"}), "text", "a turn whose content is a dict"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "text", "a turn that is neither"),
        ({"messages": [{"role": "user", "content": [None]}]}, "text", "a part that is not a dict"),
        ({"messages": [{"role": "user", "content": ["<image>"]}]}, "text", "a part that is not a dict"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
            "text",
            "a text part without text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text", "a text part without text"),
        (llava("what?", "a cat \ud83d"), "text", "half a character"),
        ({"image": b"1", "caption": "a cat \ud83d"}, "generate", "half a character"),
        ({"image": b"1", "caption": {"en": "a cat"}}, "generate", "a caption of type dict"),
        ({"image": b"1", "caption": 7}, "generate", "a caption of type int"),
        ({"image": b"1", "caption": ["", None]}, "generate", "no caption"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "text", "a turn that is neither"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "text", "neither text nor image"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(read, record, task, reason):
    with pytest.raises(UnreadableRecordError, match=reason):
        read(record, task)


def test_truncated_and_huge_pictures_are_not_decoded(read, files):
    picture = Image.effect_noise((64, 64), 50)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    for content in (buffer.getvalue()[:-200], bomb()):
        with pytest.raises(UnreadableRecordError, match="cannot be decoded"):
            read({"image": content, "caption": "a"}, "generate")


def test_a_member_of_an_archive_is_read_under_the_name_that_datasets_gives_it(read, files):
    import zipfile

    with zipfile.ZipFile(files.folder / "a.zip", "w") as archive:
        archive.writestr("1.png", files.png(1))
    name = f"zip://1.png::{files.folder / 'a.zip'}"
    assert drawn(read({"image": {"bytes": None, "path": name}, "caption": "a"}, "generate"))[1] == "assistant: #"
    with pytest.raises(UnreadableRecordError, match="not there"):
        read({"image": {"bytes": None, "path": name.replace("1", "2", 1)}, "caption": "a"}, "generate")


JSON = [
    None, True, 7, -1.5, float("nan"), 2**70, "", "a cat", "<image>", "\ud83d", "[", '["a.png"]', "a\0b", "x" * 5000,
    [], {}, [[]], b"", b"\xff",
]  # fmt: skip
NAMES = [
    "image", "images", "jpg", "caption", "captions", "text", "txt", "label", "messages", "conversations", "json",
    "from", "role", "value", "content", "type", "url", "image_url", "path", "bytes", "user", "human", "gpt", "assistant",
]  # fmt: skip


def anything(rng: random.Random, depth: int = 0):
    """A value that JSON or Parquet could hold, often with the names and forms of good records."""
    kind = rng.randrange(6) if depth < 4 else 0
    if kind < 2:
        return rng.choice([*JSON, *NAMES])
    if kind < 4:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): anything(rng, depth + 1) for _ in range(rng.randrange(5))}


def test_any_record_is_a_sample_or_an_unreadable_record(tiny_processor, tmp_path, files):
    rng, reasons, num_samples = random.Random(0), set(), 0
    good = {"image": files.png(1), "caption": "a cat", **llava("<image> what?", "a cat")}
    readers = [
        RecordReader(find_columns(names, class_names), tmp_path, tiny_processor.image_processor)
        for names in ({"image", "caption"}, {"images", "messages"}, {"jpg", "conversations"}, set(NAMES))
        for class_names in ((), ("cat", "dog"))
    ]
    for _ in range(4000):
        record = {name: anything(rng) for name in rng.sample(NAMES, rng.randrange(1, 6))}
        record |= {name: good[name] for name in rng.sample(sorted(good), rng.randrange(3))}
        reader = rng.choice(readers)
        try:
            sample = reader.sample(record, rng.choice(("text", "understand", "generate")), rng)
            tiny_processor.encode_conversations([sample.messages])
            num_samples += 1
        except UnreadableRecordError as error:
            reasons.add(str(error))
    assert num_samples > 20
    assert len(reasons) > 15


def test_a_caption_of_several_is_chosen_by_chance(tiny_processor, files, tmp_path):
    reader = RecordReader(find_columns({"image", "captions"}, ()), tmp_path, tiny_processor.image_processor)
    record = {"image": files.png(1), "captions": ["a cat", "", "one cat", None]}
    chosen = [drawn(reader.sample(record, "generate", random.Random(seed)))[0] for seed in range(20)]
    assert set(chosen) == {"user: a cat", "user: one cat"}
    assert drawn(reader.sample(record, "generate"))[0] == "user: a cat"


def test_columns_say_what_is_used_and_what_is_not():
    columns = find_columns({"jpg", "txt", "caption", "url"}, ())
    assert str(columns) == "images in ('jpg',), captions in 'txt'; not used: ['caption', 'url']"


def test_a_file_beside_an_image_goes_before_a_field_of_its_json():
    columns = find_columns({"jpg", "txt", "caption", "image"}, class_names=())
    assert (columns.images, columns.caption) == (("jpg", "image"), "txt")


def test_class_names_are_a_caption_only_if_nothing_else_is(tiny_processor, files):
    assert find_columns({"image", "label", "txt"}, class_names=("a",)).class_names == ()
    assert find_columns({"image", "label", "text"}, class_names=("a",)).caption == "text"
    columns = find_columns({"image", "label"}, class_names=("cat", "red_fox"))
    reader = RecordReader(columns, Path(), tiny_processor.image_processor)
    assert drawn(reader.sample({"image": files.png(1), "label": 1}, "generate"))[0] == "user: red fox"
    with pytest.raises(UnreadableRecordError, match="no caption"):
        reader.sample({"image": files.png(1), "label": -1}, "generate")  # not labelled


def test_an_image_alone_is_the_first_of_its_record(tiny_processor, files, number_in):
    reader = RecordReader(find_columns({"images"}, ()), Path(), tiny_processor.image_processor)
    assert number_in(reader.image({"images": [files.png(3), files.png(4)]})) == 3
    with pytest.raises(UnreadableRecordError, match="no image"):
        reader.image({"images": []})
