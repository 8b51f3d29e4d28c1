"""Records with clips: what is read of them is what the processor reads, to the bit."""

import base64
import json
import random

import pytest
import torch
from PIL import Image, ImageDraw
from test_records import NAMES, anything

from hydra_hf.data.readers import TaskReader
from hydra_hf.data.records import RecordReader, UnreadableRecordError, find_columns
from hydra_hf.data.sources import Source
from hydra_hf.files import write_video
from hydra_hf.modeling import HydraImageProcessor, HydraProcessor, HydraVideoProcessor
from hydra_hf.modeling.grid import pack_levels
from hydra_hf.modeling.image_processing_hydra import packed_pixel_values


SIZE = {"min_pixels": 64, "max_pixels": 32 * 32}


def pictures(num_frames: int, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """A red square that moves to the right over a background that grows lighter."""
    frames = []
    for index in range(num_frames):
        frame = Image.new("RGB", size, (8 * index,) * 3)
        ImageDraw.Draw(frame).rectangle((2 * index, 8, 2 * index + 10, 18), fill="red")
        frames.append(frame)
    return frames


@pytest.fixture
def clip(tmp_path):
    """A function that writes a clip and returns its path."""

    def clip(num_frames: int = 20, name: str = "a.mp4", **kwargs):
        write_video(tmp_path / name, pictures(num_frames, **kwargs), fps=10)
        return tmp_path / name

    return clip


@pytest.fixture
def processor(tiny_tokenizer):
    return HydraProcessor(
        HydraImageProcessor(size=SIZE, patch_size=8), tiny_tokenizer, patch_size=8,
        video_processor=HydraVideoProcessor(size=SIZE, patch_size=8, num_frames=9),
    )  # fmt: skip


@pytest.fixture
def read(processor, tmp_path):
    """A function that makes a sample of a record."""

    def read(record: dict, task: str = "video_understand", video_processor=processor.video_processor):
        columns = find_columns(set(record), class_names=())
        reader = RecordReader(columns, tmp_path, processor.image_processor, video_processor=video_processor)
        return reader.sample(record, task, random.Random(0))

    return read


def drawn(sample) -> list[str]:
    """Turns as "role: parts", an image as #, a clip as its number of frames in brackets."""
    signs = {"image": lambda _: "#", "video": lambda clip: f"[{clip.shape[1]}]", "text": str}
    return [
        f"{message['role']}: {' '.join(signs[part['type']](part[part['type']]) for part in message['content'])}"
        for message in sample.messages
    ]


def clip_of(sample) -> torch.Tensor:
    (found,) = [part["video"] for m in sample.messages for part in m["content"] if part["type"] == "video"]
    return found


def llava(*values: str, **columns) -> dict:
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"conversations": turns, **columns}


def test_a_caption_is_what_a_clip_is_made_from_and_what_it_is_described_by(read, clip):
    record = {"video": clip().name, "caption": "a red square"}
    assert drawn(read(record, "video_generate")) == ["user: a red square", "assistant: [9]"]
    assert drawn(read(record)) == ["user: [9] Describe the video.", "assistant: a red square"]


@pytest.mark.parametrize("placeholder", ["<video>", "<image>"])
def test_a_conversation_of_llava_has_its_clip_at_either_placeholder(read, clip, placeholder):
    record = llava(f"{placeholder}\nwhat moves?", "a square", video=clip().name)
    assert drawn(read(record)) == ["user: [9] what moves?", "assistant: a square"]


def test_a_conversation_may_have_images_beside_its_clip(read, clip, files):
    record = llava("<video> is <image> in it?", "no", video=clip().name, image=files.png(3))
    assert drawn(read(record)) == ["user: [9] is # in it?", "assistant: no"]


@pytest.mark.parametrize("name", ["video", "path", "url"])
def test_parts_of_messages_name_their_clips_as_in_transformers(read, clip, name):
    parts = [{"type": "video", name: clip().name}, {"type": "text", "text": "what moves?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a square"}]
    assert drawn(read({"messages": messages})) == ["user: [9] what moves?", "assistant: a square"]


def test_a_tag_in_a_text_without_clips_is_text(read):
    assert drawn(read(llava("what is <video>?", "a tag of HTML"), "text"))[0] == "user: what is <video>?"


def test_a_clip_may_be_bytes_an_encoded_string_a_member_or_a_folder_of_frames(read, clip, tmp_path):
    path = clip(9, "a.webp")
    content = path.read_bytes()
    encoded = "data:video/webp;base64," + base64.b64encode(content).decode()
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(pictures(9)):
        frame.save(tmp_path / "frames" / f"{index}.png")
    values = [content, {"bytes": content, "path": None}, {"bytes": None, "path": "a.webp"}, encoded, "frames"]
    clips = [clip_of(read({"video": value, "caption": "a"}, "video_generate")) for value in values]
    assert all(torch.equal(clips[0], other) for other in clips[1:])


POLICIES = {
    "a number of frames": {"num_frames": 9},
    "a rate": {"fps": 4},
    "one size": {"num_frames": 5, "size": {"height": 16, "width": 24}},
}


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_training_reads_of_a_clip_is_what_the_processor_gives_bit_for_bit(read, clip, policy, name):
    video_processor = HydraVideoProcessor(**{"size": SIZE, "patch_size": 8, **POLICIES[policy]})
    path = clip(30, name, size=(100, 70))
    trained = clip_of(read({"video": path.name, "caption": "a"}, video_processor=video_processor))
    asked = video_processor([str(path)], return_tensors="pt")
    assert trained.dtype == torch.uint8
    assert (trained.shape[1] - 1) % 4 == 0
    packed = packed_pixel_values(pack_levels([*trained.transpose(0, 1)], 8))
    assert torch.equal(packed, asked["pixel_values_videos"])
    assert asked["video_grid_thw"].tolist() == [[trained.shape[1], *(side // 8 for side in trained.shape[2:])]]


def test_a_clip_to_be_generated_is_cut_to_the_nearest_aspect_as_an_image_is(read, clip, processor):
    path = clip(5, "a.webp", size=(90, 40))
    trained = clip_of(read({"video": path.name, "caption": "a"}, "video_generate"))
    images = [processor.image_processor.generated_levels(frame) for frame in pictures(5, (90, 40))]
    assert torch.equal(trained, torch.stack(images, dim=1))


@pytest.mark.parametrize("num_frames, taken", [(5, 5), (8, 5), (9, 9), (12, 9), (40, 9)])
def test_a_short_clip_gives_as_many_frames_as_it_has_room_for(read, clip, num_frames, taken):
    record = {"video": clip(num_frames, "a.webp").name, "caption": "a"}
    assert clip_of(read(record, "video_generate")).shape[1] == taken


def test_what_is_wrong_with_a_record_is_said(read, clip, files, tmp_path):
    path = clip()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:200])
    for record, task, reason in [
        ({"video": "missing.mp4", "caption": "a"}, "video_generate", "a clip file that is not there"),
        ({"video": "empty.mp4", "caption": "a"}, "video_generate", "a clip that cannot be decoded"),
        ({"video": "cut.mp4", "caption": "a"}, "video_understand", "a clip that cannot be decoded"),
        ({"video": b"junk", "caption": "a"}, "video_understand", "a clip that cannot be decoded"),
        ({"video": "http://a.b/c.mp4", "caption": "a"}, "video_generate", "a clip that is neither bytes nor a path"),
        ({"video": clip(4, "short.webp").name, "caption": "a"}, "video_generate", "too short: it gives one frame"),
        ({"video": None, "caption": "a"}, "video_generate", "no clip"),
        ({"video": [b"1", b"2"], "caption": "a"}, "video_generate", "more than one clip"),
        ({"video": path.name, "caption": " "}, "video_generate", "no caption"),
        (llava("what?", "a", video=path.name), "video_understand", "not as many clips as placeholders"),
        (llava("<image>", "a", image=files.png(1)), "video_understand", "no clip"),
        (llava("<video>", "a", video=path.name), "understand", "a clip in a sample of images"),
        (llava("<video>", "a", video=path.name), "text", "images in a sample of text"),
        (llava("<video> draw", "<video>", video=[path.name] * 2), "video_understand", "outside the user's turns"),
    ]:  # fmt: skip
        with pytest.raises(UnreadableRecordError, match=reason):
            read(record, task)


def test_any_record_is_a_sample_or_an_unreadable_record(processor, tmp_path, clip, files):
    rng, reasons, num_samples = random.Random(0), set(), 0
    names = [*NAMES, "video", "source_image", "instruction", "target_image"]
    image = {"source_image": files.png(1), "instruction": "lighter", "target_image": files.png(9)}
    good = {"video": clip(5, "a.webp").name, "caption": "a square", **llava("<video> what?", "a square"), **image}
    readers = [
        RecordReader(
            find_columns(names, ()), tmp_path, processor.image_processor, video_processor=processor.video_processor
        )
        for names in ({"video", "caption"}, {"video", "conversations"}, {*image}, {"images", "messages"}, {*names})
    ]
    for _ in range(1000):
        record = {name: anything(rng) for name in rng.sample(names, rng.randrange(1, 6))}
        record |= {name: good[name] for name in rng.sample(sorted(good), rng.randrange(len(good)))}
        try:
            sample = rng.choice(readers).sample(
                record, rng.choice(("edit", "video_understand", "video_generate")), rng
            )
            processor.encode_each([sample.messages])
            num_samples += 1
        except UnreadableRecordError as error:
            reasons.add(str(error))
    assert num_samples > 20
    assert len(reasons) > 15


def reader_of(task: str, path, processor, **settings) -> TaskReader:
    return TaskReader((Source(task=task, path=str(path)),), processor, 0, max_length=4096, **settings)


def samples_of(reader: TaskReader, count: int) -> list:
    """Samples before they are encoded."""
    return [
        reader.read(number, lambda reader_, record, place, n=number: reader._sample(n, reader_, record, place))
        for number in range(count)
    ]


def test_a_folder_of_clips_with_texts_is_read(cache, clip, processor, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(3):
        clip(9, f"clips/{index}.mp4")
        (folder / f"{index}.txt").write_text(f"number {index}")
    samples = samples_of(reader_of("video_generate", folder, processor), 3)
    assert {drawn(sample)[0] for sample in samples} == {f"user: number {index}" for index in range(3)}


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_a_tar_of_clips_is_read_and_bad_ones_are_skipped_and_counted(cache, clip, files, processor, ending):
    content = clip(9).read_bytes()
    texts = [text if ending == "txt" else json.dumps({"caption": text}) for text in ("a", "b", "c")]
    clips = [content, content, content[:300]]
    path = files.tar([{"mp4": content, ending: text.encode()} for content, text in zip(clips, texts)])
    reader = reader_of("video_generate", path, processor)
    assert {drawn(sample)[0] for sample in samples_of(reader, 6)} == {"user: a", "user: b"}
    assert list(reader.num_skipped) == [f"{path}: a clip that cannot be decoded"]
    assert reader.num_skipped[f"{path}: a clip that cannot be decoded"] >= 2  # of two epochs


def test_a_table_of_clips_is_read(cache, clip, files, processor, tmp_path):
    import pyarrow
    import pyarrow.parquet

    content = clip(9).read_bytes()
    table = {"video": [{"bytes": content, "path": None}] * 2, "caption": ["a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    samples = samples_of(reader_of("video_understand", tmp_path / "a.parquet", processor), 2)
    assert {drawn(sample)[1] for sample in samples} == {"assistant: a", "assistant: b"}


def test_a_model_that_only_reads_images_is_given_no_clips(cache, clip, files, tiny_processor):
    path = files.jsonl([{"video": clip().name, "caption": "a"}])
    with pytest.raises(ValueError, match="'video_generate' has clips, but the processor has no video_processor"):
        reader_of("video_generate", path, tiny_processor)


def test_data_without_clips_are_refused_before_a_record_is_read(cache, files, processor):
    path = files.jsonl([{"image": "a.png", "caption": "a"}])
    with pytest.raises(ValueError, match="no clips, captions or conversations for the task 'video_generate'"):
        reader_of("video_generate", path, processor)


def test_settings_of_clips_that_training_could_not_follow_are_refused(processor, tmp_path):
    video_processor = HydraVideoProcessor(size=SIZE, patch_size=8, image_mean=[0.4] * 3)
    with pytest.raises(ValueError, match=r"The video processor has image_mean=.*0.4.*, expected .*0.5.* for training"):
        RecordReader(find_columns(set(), ()), tmp_path, processor.image_processor, video_processor=video_processor)


@pytest.mark.parametrize("task", ["edit", "video_understand", "video_generate"])
def test_no_latents_are_kept_of_clips_and_edits(task):
    with pytest.raises(ValueError, match=f"latents are kept for the tasks .*'generate'.*, got task='{task}'"):
        Source(task=task, path="a.jsonl", latents="latents")
