import io
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from hydra_hf.data.collate import collate
from hydra_hf.data.readers import TaskReader, create_readers
from hydra_hf.data.sources import Source, parse_source
from hydra_hf.modeling import HydraProcessor
from hydra_hf.modeling.processing_hydra import CHAT_TEMPLATE


pytestmark = pytest.mark.usefixtures("cache")

CHAT = CHAT_TEMPLATE.read_text(encoding="utf-8")


@pytest.fixture
def open_reader(tiny_processor):
    """A function that opens the reader of sources, written as on the command line."""

    def open_reader(*sources: str, seed: int = 0, **kwargs) -> TaskReader:
        return TaskReader(tuple(map(parse_source, sources)), tiny_processor, seed, **{"max_length": 128, **kwargs})

    return open_reader


def texts(reader: TaskReader, numbers) -> list[str]:
    """The last text of each sample, which is the caption or the answer."""
    samples = [reader[number] for number in numbers]
    return [
        [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"][-1]
        for sample in samples
    ]


def numbers(count: int) -> list[str]:
    return sorted(f"number {n}" for n in range(count))


# Sources


def test_a_source_is_written_on_one_line():
    assert parse_source("generate=/data/{000..123}.tar") == Source(task="generate", path="/data/{000..123}.tar")
    assert parse_source("understand=a.jsonl,image_root=/data/images,weight=2,split=train[:5]") == Source(
        task="understand", path="a.jsonl", image_root="/data/images", weight=2.0, split="train[:5]"
    )
    assert parse_source("text=hub:owner/name,streaming=true") == Source(
        task="text", path="hub:owner/name", streaming=True
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.jsonl", "is not TASK=PATH"),
        ("generate=", "has an empty path"),
        ("generate=hub:", "has an empty path"),
        ("paint=a.jsonl", "task='paint', expected one of"),
        ("edit=a.jsonl,latents=b", "latents are kept for the tasks .*, got task='edit'"),
        ("text=a.jsonl,weight=much", "'much', expected a number|could not convert"),
        ("text=a.jsonl,weight=0", "weight=0.0 must be a number above 0"),
        ("text=a.jsonl,weight=nan", "weight=nan must be"),
        ("text=a.jsonl,streaming=yes", "'yes', expected a number or true or false"),
        ("text=a.jsonl,colour=red", "has 'colour=red', expected NAME=VALUE"),
        ("text=a.jsonl,weight", "has 'weight', expected NAME=VALUE"),
        ("text=a.jsonl,weight=1,weight=2", "each once"),
    ],
)
def test_a_source_that_is_written_wrongly_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_source(text)


# Formats


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("kind", ["metadata", "text files", "parquet", "parquet of bytes", "tar", "jsonl"])
def test_captions_and_images_of_every_format_stay_together(files, open_reader, number_in, kind, streaming):
    path = write_captioned(files, kind)
    reader = open_reader(f"generate={path},streaming={streaming}")
    samples = [reader[number] for number in range(4)]
    captions = [sample.messages[0]["content"][0]["text"] for sample in samples]
    assert sorted(captions) == ["number 1", "number 2", "number 3", "number 4"]
    images = [sample.messages[1]["content"][0]["image"] for sample in samples]
    assert captions == [f"number {number_in(image)}" for image in images]
    assert not reader.num_skipped


def write_captioned(files, kind: str):
    """Pictures 1 to 4 with their captions."""
    import pyarrow

    if kind == "parquet":
        return files.parquet(range(1, 5))
    if kind == "parquet of bytes":
        images = pyarrow.array([files.png(n) for n in range(1, 5)])
        return files.parquet(range(1, 5), image=images)
    if kind == "tar":
        return files.captioned_tar(range(1, 5))
    folder = files.folder_of(range(1, 5))
    rows = [{"file_name": f"{n:03d}.png", "text": f"number {n}"} for n in range(1, 5)]
    if kind == "jsonl":
        rows = [{"image": f"pictures/{row['file_name']}", "caption": row["text"]} for row in rows]
        return files.jsonl(rows)
    if kind == "metadata":
        files.jsonl(rows, "pictures/metadata.jsonl")
    else:
        for number in range(1, 5):
            (folder / f"{number:03d}.txt").write_text(f"number {number}\n")
    return folder


def test_names_of_class_folders_are_captions_when_there_are_no_others(files, open_reader):
    files.folder_of([1], "pictures/cat")
    files.folder_of([2], "pictures/red_fox")
    reader = open_reader(f"generate={files.folder}/pictures")
    assert sorted({reader[n].messages[0]["content"][0]["text"] for n in range(4)}) == ["cat", "red fox"]


def test_a_list_of_images_in_parquet_is_read(files, open_reader):
    import datasets

    row = {"images": [[{"bytes": files.png(n), "path": None} for n in (1, 2)]],
           "conversations": [[{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "two"}]]}  # fmt: skip
    features = datasets.Dataset.from_dict(row).features | {"images": datasets.List(datasets.Image())}
    datasets.Dataset.from_dict(row, features=datasets.Features(features)).to_parquet(files.folder / "a.parquet")
    content = open_reader(f"understand={files.folder}/a.parquet")[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_one_file_of_mixed_conversations_serves_two_tasks(files, open_reader, name):
    files.folder_of([1, 2])
    rows = files.chats([7])
    for image, question in (("001.png", "<image>?"), (["001.png", "002.png"], "<image><image>?")):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {question.count('<')}"}]
        rows.append({"id": len(rows), "image": image, "conversations": turns})
    path = files.folder / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    assert set(texts(open_reader(f"text={path}"), range(6))) == {"number 7"}
    reader = open_reader(f"understand={path},image_root={files.folder}/pictures")
    assert set(texts(reader, range(9))) == {"number 1", "number 2"}


def test_the_columns_are_listed_when_none_fits(files, open_reader):
    path = files.jsonl([{"url": "a", "caption": "b"}])
    with pytest.raises(ValueError, match=r"columns \('caption', 'url'\).*'generate'"):
        open_reader(f"generate={path}")
    with pytest.raises(ValueError, match=r"columns \('caption', 'image'\).*'text'"):
        open_reader(f"text={files.parquet([1])}")
    with pytest.raises(ValueError, match="no images, captions or conversations for the task 'generate'"):
        open_reader(f"generate={files.folder_of([1])}")
    for name in ("train2017", "val2017"):
        files.folder_of([1], f"coco/{name}")
    with pytest.raises(ValueError, match="names of its folders, such as 'train2017', are not taken for captions"):
        open_reader(f"generate={files.folder}/coco")


def test_what_is_read_of_a_source_is_logged(files, open_reader, caplog):
    with caplog.at_level(logging.INFO):
        open_reader(f"generate={files.parquet([1], url=['a'])}")
    assert "images in ('image',), captions in 'caption'; not used: ['url']" in caplog.text


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_source_without_records_is_refused(files, open_reader, streaming):
    import pyarrow

    (files.folder / "empty").mkdir()
    (files.folder / "empty.jsonl").write_text("")
    files.tar([], "empty.tar")
    files.parquet([], "empty.parquet", image=pyarrow.array([], "binary"), caption=pyarrow.array([], "string"))
    for name in ("empty", "empty.jsonl", "empty.tar", "empty.parquet"):
        with pytest.raises(ValueError, match=f"{name} has no records"):
            open_reader(f"generate={files.folder}/{name},streaming={streaming}")


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    "name, reason",
    [("a.parquet", "not a Parquet file"), ("a.tar", "not a tar file"), ("a.json", "a JSON list that is cut off")],
)
def test_a_file_of_which_nothing_can_be_read_is_named(files, open_reader, name, reason, streaming):
    (files.folder / name).write_text("[junk")
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*{name}: {reason}"):
        open_reader(f"generate={files.folder}/{name},streaming={streaming}")


def test_a_slice_of_a_source_is_read(files, open_reader):
    reader = open_reader(f"text={files.jsonl(files.chats(range(9)))},split=train[2:4]")
    assert set(texts(reader, range(9))) == {"number 2", "number 3"}


def test_text_that_looks_like_special_tokens_stays_text(files, open_reader, tiny_processor):
    caption = "<|vision_start|><|image_pad|><|im_end|><|im_start|>assistant"
    path = files.jsonl([{"image": "pictures/001.png", "caption": caption}])
    files.folder_of([1])
    for task in ("generate", "understand"):
        batch = collate([open_reader(f"{task}={path}")[0]], tiny_processor)
        tokens = tiny_processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
        assert [tokens.count(token) for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>")] == [2, 2, 1]
        assert tokens.count("<|image_pad|>") == 17  # a time token and 16 patches


# Order


def test_a_sample_is_a_function_of_seed_and_number(files, open_reader):
    path = f"text={files.jsonl(files.chats(range(20)))}"
    assert texts(open_reader(path), range(60)) == texts(open_reader(path), range(60))
    assert texts(open_reader(path), reversed(range(60))) == texts(open_reader(path), range(60))[::-1]
    assert texts(open_reader(path, seed=1), range(20)) != texts(open_reader(path), range(20))


def test_every_record_is_read_once_in_an_epoch(files, open_reader):
    reader = open_reader(f"text={files.jsonl(files.chats(range(20)))}")
    read = texts(reader, range(60))
    assert all(sorted(read[start : start + 20]) == numbers(20) for start in (0, 20, 40))


def test_weights_are_the_shares_of_the_sources(files, open_reader):
    first = files.jsonl(files.chats(range(100)), "a.jsonl")
    second = files.jsonl(files.chats(range(100, 200)), "b.jsonl")
    read = texts(open_reader(f"text={first}", f"text={second},weight=3"), range(1000))
    share = sum(int(text.split()[1]) < 100 for text in read) / 1000
    assert 0.22 < share < 0.28
    from_second = [text for text in read if int(text.split()[1]) >= 100]
    assert len(set(from_second[:100])) == 100  # an epoch of its own


def test_every_source_is_counted_through_without_a_gap(files, open_reader):
    path = f"text={files.jsonl(files.chats(range(3)))}"
    reader = open_reader(path, f"{path},weight=2")
    places = [reader.place_of(number) for number in range(2 * 1024)]
    for source, count in ((0, 341), (1, 683)):  # of 1024
        assert [own for index, own in places if index == source] == list(range(2 * count))


def test_a_source_that_would_never_be_read_is_refused(files, open_reader):
    path = files.jsonl(files.chats([1]))
    with pytest.raises(ValueError, match=r"weight=0\.0001 of 1\.0001 in all is less than one in 1024"):
        open_reader(f"text={path}", f"text={path},weight=0.0001")


def test_prompts_are_dropped_as_often_as_asked(files, open_reader):
    reader = open_reader(f"generate={files.parquet(range(5))}", drop_prompt=0.3)
    prompts = [reader[number].messages[0]["content"][0]["text"] for number in range(200)]
    assert 35 < prompts.count("") < 85
    assert prompts[:20] == [reader[number].messages[0]["content"][0]["text"] for number in range(20)]


def test_answers_are_never_dropped(files, open_reader):
    reader = open_reader(f"understand={files.parquet(range(5))}", drop_prompt=1.0)
    assert sorted(texts(reader, range(5))) == numbers(5)


# What cannot be read


def broken(files) -> str:
    """Pictures 0 to 9; 3 is junk, 5 is cut off, 7 has no caption."""
    noise = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(noise, "PNG")
    samples = [{"png": files.png(n), "txt": f"number {n}".encode()} for n in range(10)]
    samples[3]["png"], samples[5]["png"] = b"junk", noise.getvalue()[:-300]
    del samples[7]["txt"]
    return str(files.tar(samples))


def test_records_that_cannot_be_read_are_replaced_and_counted(files, open_reader, caplog):
    path = broken(files)
    reader = open_reader(f"generate={path}")
    with caplog.at_level(logging.WARNING):
        first, second = Counter(captions(reader, range(10))), captions(reader, range(10, 20))
    assert sum(first.values()) == 10
    assert set(first) == set(second) == {f"number {n}" for n in (0, 1, 2, 4, 6, 8, 9)}
    assert set(reader.num_skipped) == {f"{path}: an image that cannot be decoded", f"{path}: no caption"}
    assert reader.num_skipped[f"{path}: an image that cannot be decoded"] >= 4
    assert len(caplog.records) == 2  # once for each reason
    assert "Record 7 of" in caplog.text


def test_what_takes_the_place_of_a_record_is_the_same_for_every_asker(files, open_reader):
    path = broken(files)
    forwards = captions(open_reader(f"generate={path}"), range(30))
    assert captions(open_reader(f"generate={path}"), range(29, -1, -1)) == forwards[::-1]


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_a_stream_skips_what_cannot_be_read(files, open_reader, prefix):
    path = broken(files) if not prefix else f"hub:{Path(broken(files)).parent}"
    reader = open_reader(f"generate={path},streaming=true")
    assert set(captions(reader, range(20))) == {f"number {n}" for n in (0, 1, 2, 4, 6, 8, 9)}
    assert sum(reader.num_skipped.values()) >= 3


def test_a_malformed_line_far_into_a_file_does_not_end_a_run(files, open_reader):
    lines = [json.dumps(chat).encode() for chat in files.chats(range(300))]
    lines[250], lines[260] = b'{"conversations": \xff}', b"{broken"
    path = files.folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    for streaming in ("false", "true"):
        reader = open_reader(f"text={path},streaming={streaming}")
        assert len(set(texts(reader, range(300)))) == 298
        assert reader.num_skipped == {f"{path}: a record that is not JSON": 2}


def test_what_is_lost_of_a_file_is_logged_and_counted(files, open_reader, caplog):
    paths = [files.captioned_tar(range(3), f"{n}.tar") for n in range(2)]
    paths[1].write_bytes(paths[1].read_bytes()[: 8 * 512 + 100])
    with caplog.at_level(logging.WARNING):
        reader = open_reader(f"generate={files.folder}/{{0..1}}.tar")
    assert reader.num_skipped == {f"{paths[1]}: 100 damaged bytes from byte 4096": 1}
    assert f"Lost: {paths[1]}: 100 damaged bytes from byte 4096 (1)." in caplog.text


def test_the_caption_of_several_belongs_to_the_row(files, open_reader):
    names = [["a cat", "one cat", "the cat"]]
    path = files.jsonl([{"image": "1.png", "captions": names[0]}])
    (files.folder / "1.png").write_bytes(files.png(1))
    reader = open_reader(f"generate={path}")
    chosen = captions(reader, range(30))
    assert set(chosen) == set(names[0])
    assert captions(open_reader(f"generate={path}"), range(29, -1, -1)) == chosen[::-1]


def test_a_file_that_goes_away_is_skipped_like_a_record(files, open_reader):
    paths = [files.captioned_tar(range(3), "0.tar"), files.captioned_tar(range(3, 6), "1.tar")]
    reader = open_reader(f"generate={files.folder}/{{0..1}}.tar")
    paths[1].unlink()
    assert set(captions(reader, range(12))) == {"number 0", "number 1", "number 2"}
    assert list(reader.num_skipped) == [
        f"{files.folder}/{{0..1}}.tar: a file that cannot be read (No such file or directory)"
    ]


@pytest.mark.parametrize("task", ["generate", "understand"])
def test_a_sample_longer_than_the_context_is_skipped_whole_and_counted(files, open_reader, tiny_processor, task):
    path = files.tar([{"png": files.png(n), "txt": b"a cat" + n * b" a cat"} for n in range(3)])

    def batches(**kwargs) -> list[dict]:
        reader = open_reader(f"{task}={path}", **kwargs)
        made = [collate([reader[number]], tiny_processor) for number in range(12)]
        return [{**batch, "num_skipped": dict(reader.num_skipped)} for batch in made]

    def lengths(made: list[dict]) -> list[int]:
        return sorted({batch["input_ids"].shape[1] for batch in made})

    short, middle, long = lengths(batches())
    limited = batches(max_length=middle)
    assert lengths(limited) == [short, middle]
    assert {int((batch["mm_token_type_ids"] == 1).sum()) for batch in limited} == {17}  # a time token, 16 patches
    (reason,), (count,) = limited[-1]["num_skipped"].keys(), limited[-1]["num_skipped"].values()
    assert reason == f"{path}: more than max_length={middle} tokens"
    assert count >= 4  # once in each epoch of three


def test_samples_read_together_are_those_read_alone(files, open_reader):
    source = f"understand={files.tar([{'png': files.png(n), 'txt': b'a cat' + n * b' a cat'} for n in range(4)])}"
    lengths = sorted({len(sample.encoding["input_ids"]) for sample in open_reader(source).batch(range(4))})
    alone, together = (open_reader(source, max_length=lengths[1]) for _ in range(2))
    expected, found = [alone[number] for number in range(12)], together.batch(range(12))
    assert {len(sample.encoding["input_ids"]) for sample in found} == {*lengths[:2]}
    assert together.num_skipped == alone.num_skipped
    assert sum(together.num_skipped.values()) >= 6  # two in each epoch of four
    for a, b in zip(expected, found, strict=True):
        assert a.encoding.keys() == b.encoding.keys()
        assert all(torch.equal(a.encoding[name], b.encoding[name]) for name in a.encoding)
        assert torch.equal(*[sample.messages[0]["content"][0]["image"] for sample in (a, b)])


def test_a_chat_that_a_template_of_the_users_own_refuses_is_skipped_alone(files, tiny_processor):
    template = "{%- if messages|length > 2 -%}{{- raise_exception('one turn each') -}}{%- endif -%}" + CHAT
    processor = HydraProcessor(
        tiny_processor.image_processor, tiny_processor.tokenizer, patch_size=8, chat_template=template
    )
    chats = [[("human", "what"), ("gpt", "a cat")], [("human", "what"), ("gpt", "a cat"), ("human", "and")]]
    path = files.jsonl([{"conversations": [{"from": name, "value": text} for name, text in chat]} for chat in chats])
    reader = TaskReader((parse_source(f"text={path}"),), processor, 0, max_length=64)
    assert [len(sample.messages) for sample in reader.batch(range(8))] == [2] * 8
    assert list(reader.num_skipped) == [f"{path}: a record of another form (TemplateError)"]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_source_with_nothing_readable_is_refused_after_a_thousand_tries(files, open_reader, streaming):
    reader = open_reader(f"generate={files.tar([{'png': b'junk', 'txt': b'a'}] * 3)},streaming={streaming}")
    with pytest.raises(ValueError, match="none of 1000 records can be read"):
        reader[0]
    assert sum(reader.num_skipped.values()) == 1000


def captions(reader: TaskReader, numbers) -> list[str]:
    return [reader[number].messages[0]["content"][0]["text"] for number in numbers]


# Streams


def stream_of(files, numbers, name: str) -> str:
    """A source that `datasets` streams, as it does from the Hub."""
    (files.folder / name).mkdir()
    files.jsonl(files.chats(numbers), f"{name}/rows.jsonl")
    return f"text=hub:{files.folder}/{name},streaming=true"


def test_a_reader_of_streams_resumes_where_it_was_saved(files, open_reader):
    sources = [stream_of(files, range(7), "a"), stream_of(files, range(10, 15), "b"),
               f"text={files.jsonl(files.chats(range(20, 25)), 'c.jsonl')}"]  # fmt: skip
    unbroken = texts(open_reader(*sources), range(40))
    reader = open_reader(*sources)
    texts(reader, range(17))
    again = open_reader(*sources)
    again.load_state_dict(reader.state_dict())
    assert texts(again, range(17, 40)) == unbroken[17:]


def test_a_position_of_other_streams_is_refused(files, open_reader):
    path = stream_of(files, range(4), "a")
    state = open_reader(path).state_dict()
    for other in (open_reader(path, num_processes=2), open_reader(path, path), open_reader(path.split(",")[0])):
        with pytest.raises(ValueError, match="is not one of the streams of"):
            other.load_state_dict(state)


# Several tasks


def test_there_is_a_reader_for_every_task_with_samples(files, tiny_processor):
    sources = (
        Source(task="text", path=str(files.jsonl(files.chats([1])))),
        Source(task="generate", path=str(files.parquet([1]))),
        Source(task="understand", path="nowhere"),
    )
    readers = create_readers(sources, {"text": 1, "generate": 2, "understand": 0}, tiny_processor, 0, max_length=128)
    assert {task: reader[0].task for task, reader in readers.items()} == {"text": "text", "generate": "generate"}


def test_a_task_without_data_is_refused(tiny_processor):
    with pytest.raises(ValueError, match="no data for the task 'understand'.*understand=PATH"):
        create_readers((), {"understand": 1}, tiny_processor, 0, max_length=128)


def test_sources_of_two_tasks_do_not_make_a_reader(open_reader):
    with pytest.raises(ValueError, match=r"the tasks \['generate', 'text'\], expected one"):
        open_reader("text=a.jsonl", "generate=b.parquet")
