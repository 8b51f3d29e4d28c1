"""What the page's buttons do, what a model is offered, and the Space folder: all without Gradio and without a browser."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image

import hydra_hf
from hydra_hf import HydraProcessor
from hydra_hf.cli import main
from hydra_hf.demo.abilities import EXAMPLES, PICTURES, TAGS, examples_of, find_tasks, read_tags
from hydra_hf.demo.actions import Actions
from hydra_hf.demo.space import requirements, write_space
from hydra_hf.modeling.video_reading import read_video
from hydra_hf.pipelines.answering import answer


IMAGES = ["generate", "understand", "edit", "depth", "segment"]
CLIPS = ["video_generate", "video_understand"]


def picture(size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


# Drawing


def test_a_drawing_ends_with_what_the_pipeline_draws(tiny_pipeline):
    *steps, (last, drawn) = Actions(tiny_pipeline).draw("a cat", seed=5, num_inference_steps=4)
    expected = tiny_pipeline("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
    assert same(drawn, expected)
    assert [step for step, _ in steps] == [1, 2, 3]  # nothing is shown twice
    assert last == 4


def test_what_is_shown_meanwhile_is_where_the_last_step_leads(tiny_pipeline, monkeypatch):
    decoded = []
    decode = tiny_pipeline.decode
    monkeypatch.setattr(
        tiny_pipeline,
        "decode",
        lambda latents, *args, **kwargs: decoded.append(latents) or decode(latents, *args, **kwargs),
    )
    steps = list(Actions(tiny_pipeline).draw("a cat", seed=0, num_inference_steps=5))
    assert [drawn is None for _, drawn in steps] == [
        True,
        False,
        False,
        False,
        False,
    ]  # the first step has none before it
    *expected, final = decoded
    assert len(expected) == 3
    assert not torch.allclose(expected[0], final, atol=1e-2)
    at_half, at_quarter, clean = (torch.lerp(final, torch.ones_like(final), sigma) for sigma in (0.5, 0.25, 0.0))
    Actions(tiny_pipeline)._expected(at_half, at_quarter, torch.tensor(0.5), torch.tensor(0.25), seed=0)
    torch.testing.assert_close(decoded[-1], clean, atol=1e-5, rtol=1e-5)


def test_a_reader_who_leaves_stops_the_drawing_and_frees_the_model(tiny_pipeline):
    done = []
    step = tiny_pipeline.denoise_step
    tiny_pipeline.denoise_step = lambda *args: done.append(time.sleep(0.01)) or step(*args)
    actions = Actions(tiny_pipeline)
    drawing = actions.draw("a cat", seed=0, num_inference_steps=200)
    next(drawing)
    drawing.close()
    assert actions.ask(picture(), "what is in the picture") is not None  # waits until the model is free
    assert len(done) < 100
    assert tiny_pipeline.num_timesteps == 200


def test_a_wrong_request_is_the_pipelines_own_error_and_leaves_the_model_free(tiny_pipeline):
    actions = Actions(tiny_pipeline)
    with pytest.raises(ValueError, match="height=3"):
        list(actions.draw("a cat", seed=0, height=3))
    assert list(actions.draw("a cat", seed=0, num_inference_steps=1))[-1][0] == 1


def test_two_drawings_at_once_are_those_of_one_after_the_other(tiny_pipeline):
    actions = Actions(tiny_pipeline)
    alone = [list(actions.draw(prompt, seed=1, num_inference_steps=3))[-1][1] for prompt in ("a cat", "a red circle")]
    first, second = (actions.draw(prompt, seed=1, num_inference_steps=3) for prompt in ("a cat", "a red circle"))
    together = list(itertools.zip_longest(first, second))
    ends = [[each for each in column if each is not None][-1][1] for column in zip(*together)]
    assert all(same(*pair) for pair in zip(alone, ends))


def test_edits_and_clips_are_the_pipelines(clip_pipeline):
    actions, image = Actions(clip_pipeline), picture()
    (*_, (_, edited)) = actions.draw("a cat", seed=2, image=image)
    assert same(edited, clip_pipeline("a cat", image=image, generator=torch.Generator().manual_seed(2)).images[0])
    (*steps, (_, clip)) = actions.draw("a cat", seed=2, num_frames=5, height=16, width=16)
    assert len(clip) == 5
    assert [shown for _, shown in steps] == [None] * 2


# The other buttons


def test_questions_rebuilding_and_maps(tiny_pipeline):
    actions, image = Actions(tiny_pipeline), picture()
    (expected,) = answer(tiny_pipeline.model, tiny_pipeline.processor, [image], ["what is in the picture"])
    assert actions.ask(image, "what is in the picture") == expected
    assert actions.rebuild(image).size == image.size
    depth, boundaries = actions.paint(image, ["depth", "segment"])
    assert depth.size == boundaries.size == image.size
    assert not same(depth, boundaries)


# What a model is offered


def test_a_model_of_images_alone_has_no_clips(tiny_processor, clip_pipeline):
    assert find_tasks(tiny_processor, tags=set()) == IMAGES
    assert find_tasks(clip_pipeline.processor, tags=set()) == IMAGES + CLIPS


def test_the_tags_of_a_card_say_what_a_model_does(tiny_processor, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [hydra, text-to-image, depth-estimation, text-to-video]\n---\n")
    assert find_tasks(tiny_processor, read_tags(str(tmp_path))) == ["generate", "depth"]
    (tmp_path / "README.md").write_text("# no metadata\n")
    assert read_tags(str(tmp_path)) == set()


def test_a_folder_or_a_repo_without_a_card_has_no_tags(tmp_path):
    assert read_tags(str(tmp_path)) == set()
    assert read_tags("nobody/nothing") == set()  # offline, as all tests are


def test_a_small_world_is_not_offered_what_it_has_no_words_for(tiny_processor):
    tiny_processor.known_words = ["a", "cat", "how", "many", "apples", "are", "there"]
    assert examples_of("generate", tiny_processor) == [["a cat"]]
    assert find_tasks(tiny_processor, tags=set()) == ["generate", "understand", "depth", "segment"]


def test_the_embedded_checkpoint_says_all_that_it_does():
    processor = HydraProcessor.from_pretrained(hydra_hf.TINY, subfolder="processor")
    assert find_tasks(processor, read_tags(hydra_hf.TINY)) == find_tasks(processor, set())


def test_examples_are_there():
    files = {value for row in (*PICTURES, *itertools.chain(*EXAMPLES.values())) for value in row if "/" in value}
    assert {Path(name).parent.name for name in files} == {"examples"}
    for name in files:
        if name.endswith(".mp4"):
            pytest.importorskip("av")
            assert len(read_video(name, lambda metadata: range(metadata.total_num_frames))[0]) == 17
        else:
            assert Image.open(name).size == (64, 64)
    assert set(EXAMPLES) <= set(TAGS)


# The Space


def test_a_space_of_the_embedded_checkpoint_is_complete(tmp_path, capsys):
    assert main(["demo", "--space", str(tmp_path / "space")]) == 0
    assert "app.py" in capsys.readouterr().out
    card = SpaceCard.load(tmp_path / "space" / "README.md").data
    assert (card.sdk, card.app_file, card.title) == ("gradio", "app.py", "hydra-tiny")
    assert {path.name for path in (tmp_path / "space").iterdir()} == {
        "README.md",
        "app.py",
        "requirements.txt",
        "hydra_hf",
    }
    assert (tmp_path / "space" / "hydra_hf" / "assets" / "hydra-tiny" / "model_index.json").is_file()


def test_a_space_holds_the_model_of_a_folder_and_names_that_of_the_hub(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "mine")
    write_space(tmp_path / "space", str(tmp_path / "mine"))
    assert (tmp_path / "space" / "model" / "model_index.json").is_file()
    assert not (tmp_path / "space" / "hydra_hf" / "assets" / "hydra-tiny").exists()
    assert str(tmp_path) not in (tmp_path / "space" / "app.py").read_text()
    write_space(tmp_path / "space", "owner/name")
    assert not (tmp_path / "space" / "model").exists()
    assert SpaceCard.load(tmp_path / "space" / "README.md").data.models == ["owner/name"]
    assert "MODEL = 'owner/name'" in (tmp_path / "space" / "app.py").read_text()


def test_a_space_replaces_no_other_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="has .'thesis.tex'., expected a new folder"):
        write_space(tmp_path, hydra_hf.TINY)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_space_is_no_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--space", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_requirements_are_what_the_page_needs():
    names = {Requirement(line).name for line in requirements()}
    assert {"torch", "transformers", "diffusers", "gradio"} <= names
    assert not {"pytest", "peft", "ruff"} & names
