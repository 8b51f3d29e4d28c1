"""`hydra chat` with the embedded checkpoint, which decides by itself when to draw."""

import io
import json
import sys

import pytest
from PIL import Image

import hydra_hf
from hydra_hf.cli import create_parser, main
from hydra_hf.cli.chat import Chat
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from toy_models import toy_pipeline


@pytest.fixture(scope="module")
def pipeline() -> HydraPipeline:
    return HydraPipeline.from_pretrained(hydra_hf.TINY)


@pytest.fixture
def chat(pipeline, tmp_path) -> Chat:
    arguments = ["chat", "--out", str(tmp_path / "drawn"), "--num_inference_steps", "8"]
    return Chat(pipeline, create_parser().parse_args(arguments))


def kinds(chat: Chat) -> list[tuple[str, list[str]]]:
    """The role of each message, and the types of its parts."""
    return [(message["role"], [part["type"] for part in message["content"]]) for message in chat.messages]


def test_a_piped_dialogue_draws_saves_answers_and_survives_mistakes(tmp_path, monkeypatch, capsys):
    drawn, copy = tmp_path / "drawn", tmp_path / "copy.png"
    lines = ["a cat", "/image nowhere.png", "what is in the picture?", "", f"/save {copy}", "/quit", "a dog"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--out", str(drawn), "--num_inference_steps", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(drawn / "001.png"), "cat", str(copy)]
    (mistake,) = [line for line in captured.err.splitlines() if line.startswith("hydra chat: ")]
    assert "nowhere.png" in mistake
    assert Image.open(copy).tobytes() == Image.open(drawn / "001.png").tobytes()


def test_a_dialogue_as_json_is_a_line_for_each_answer(tmp_path, monkeypatch, capsys):
    drawn = tmp_path / "drawn"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(["a cat", "what is in the picture?", "/save", "/reset"])))
    assert main(["chat", "--out", str(drawn), "--num_inference_steps", "8", "--json"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == [
        {"answer": [{"type": "image", "path": str(drawn / "001.png")}]},
        {"answer": [{"type": "text", "text": "cat"}]},
    ]
    assert captured.err.splitlines() == [str(drawn / "001.png"), "cat", "hydra chat: /save needs a path."]


def test_the_dialogue_is_kept_with_its_images(chat, tmp_path):
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "given.png")
    chat.take("a red circle")
    chat.take(f"/image {tmp_path / 'given.png'}")
    chat.take("what is in the picture?")
    assert kinds(chat)[:3] == [("user", ["text"]), ("assistant", ["image"]), ("user", ["image", "text"])]
    assert kinds(chat)[3][0] == "assistant"
    assert chat.attached == []
    chat.take("/reset")
    assert kinds(chat) == []


def test_a_drawn_image_gets_the_next_free_number(chat, tmp_path):
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "007.png").write_bytes(b"of an earlier chat")
    chat.take("a dog")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["007.png", "008.png"]
    assert (tmp_path / "drawn" / "007.png").read_bytes() == b"of an earlier chat"


def test_a_turn_that_fails_leaves_the_dialogue_as_it_was(chat):
    with pytest.raises(ValueError, match="the context has 512"):
        chat.take("a cat " * 300)
    assert kinds(chat) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", "/image needs a path"),
        ("/draw a cat", "/draw is not a command, expected one of /image, /video, /save, /reset, /quit"),
        ("/save cat.png", "nothing has been drawn yet"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(chat, line, message):
    with pytest.raises(ValueError, match=message):
        chat.take(line)


def test_a_clip_for_a_model_of_images_says_what_is_wrong(tmp_path):
    chat = Chat(toy_pipeline(), create_parser().parse_args(["chat", "--out", str(tmp_path / "drawn")]))
    with pytest.raises(ValueError, match="this model reads no clips"):
        chat.take("/video clip.mp4")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--height", "30"), ("--max_images", "0"), ("--guidance_scale", "-1"), ("--max_new_tokens", "0")],
)
def test_wrong_options_are_refused_before_the_dialogue(pipeline, option, value):
    with pytest.raises(ValueError, match=f"{option.removeprefix('--')}=-?{value.removeprefix('-')}"):
        Chat(pipeline, create_parser().parse_args(["chat", option, value]))
