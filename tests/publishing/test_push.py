"""Models, adapters and data on the Hub and back, by the real clients against a server on loopback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

import hub_server
from hydra_hf import TINY, HydraPipeline, HydraReconstructionPipeline
from hydra_hf.cli import main
from hydra_hf.evaluation.report import SuiteResult
from hydra_hf.hub import subfolder_of
from hydra_hf.publishing.card import read_scores, write_card
from hydra_hf.publishing.push import push
from hydra_hf.registration import register


SETTINGS = {"num_inference_steps": 3, "guidance_scale": 3.0}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def picture_of(drawn) -> torch.Tensor:
    drawn.set_progress_bar_config(disable=True)
    return drawn("a cat", generator=seeded(), output_type="pt").images


def assert_same_weights(model, other) -> None:
    expected, weights = model.state_dict(), other.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    """The folder of the tiny pipeline."""
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_model_and_processor_share_a_repo(hub, tiny_model, tiny_processor):
    tiny_model.push_to_hub("me/both")
    tiny_processor.push_to_hub("me/both")
    assert_same_weights(tiny_model, AutoModelForMultimodalLM.from_pretrained("me/both"))
    assert AutoProcessor.from_pretrained("me/both").patch_size == tiny_processor.patch_size


def test_the_tokenizer_goes_and_comes_back_alone(hub, tiny_model, tiny_processor):
    tower = tiny_model.model.vision_tower
    tower.push_to_hub("me/tok")
    tiny_processor.image_processor.push_to_hub("me/tok")
    loaded = AutoModel.from_pretrained("me/tok")
    assert_same_weights(tower, loaded)
    assert HydraReconstructionPipeline(loaded, tiny_processor.image_processor)


def test_a_pipeline_pushes_itself(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("me/pipe")
    assert "model/config.json" in hub.files("models/me/pipe")
    torch.testing.assert_close(picture_of(HydraPipeline.from_pretrained("me/pipe")), picture_of(tiny_pipeline))


def test_one_flat_repo_opens_by_every_front_door(hub, tiny_pipeline, saved):
    """With the package imported nobody needs to trust the code in it."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

    push(saved, "me/flat")
    names = hub.files("models/me/flat")
    assert {"config.json", "model.safetensors", "processor_config.json", "model_index.json", "README.md"} <= set(names)
    expected = picture_of(tiny_pipeline)
    for front_door in (HydraPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image):
        loaded = front_door.from_pretrained("me/flat")
        assert type(loaded) is HydraPipeline
        torch.testing.assert_close(picture_of(loaded), expected, atol=1e-5, rtol=1e-5)
    assert_same_weights(tiny_pipeline.model, AutoModelForMultimodalLM.from_pretrained("me/flat"))
    chat = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    drawn = pipeline("any-to-any", "me/flat")(
        chat, generation_mode="image", generate_kwargs={**SETTINGS, "generator": seeded()}
    )
    assert drawn[0]["generated_image"].size == (32, 32)
    image = {"type": "image", "image": Image.new("RGB", (32, 32), "red")}
    question = [{"role": "user", "content": [image, {"type": "text", "text": "what is in the picture"}]}]
    assert pipeline("image-text-to-text", "me/flat")(text=question, max_new_tokens=2)


def test_a_branch_leaves_main_alone(hub, tiny_pipeline, saved):
    push(saved, "me/branches")
    before = hub.files("models/me/branches")
    with torch.no_grad():
        tiny_pipeline.model.lm_head.weight.zero_()
    tiny_pipeline.save_pretrained(saved)
    push(saved, "me/branches", revision="zeros")
    assert hub.files("models/me/branches") == before
    zeros = AutoModelForMultimodalLM.from_pretrained("me/branches", revision="zeros")
    assert not zeros.lm_head.weight.any()
    assert AutoModelForMultimodalLM.from_pretrained("me/branches").lm_head.weight.any()


def test_a_pull_request_changes_main_once_it_is_merged(hub, saved):
    push(saved, "me/reviewed", message="first")
    before = hub.files("models/me/reviewed")
    (saved / "scores.json").write_text('{"vqa/mean": 0.5}')
    url = push(saved, "me/reviewed", create_pr=True)
    assert url == f"{hub.endpoint}/me/reviewed/discussions/1"
    assert hub.files("models/me/reviewed") == before
    assert "scores.json" in hub.files("models/me/reviewed", "refs/pr/1")
    HydraPipeline.from_pretrained("me/reviewed", revision="refs/pr/1")
    HfApi().merge_pull_request("me/reviewed", 1)
    assert "scores.json" in hub.files("models/me/reviewed")


def test_a_private_repo_opens_for_its_owner_alone(hub, saved, monkeypatch):
    push(saved, "me/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="me/secret"):
        HydraPipeline.from_pretrained("me/secret")
    HydraPipeline.from_pretrained("me/secret", token=hub_server.TOKEN)


def test_a_wrong_token_is_one_line(hub, saved, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(saved), "me/refused"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Invalid credentials" in line
    assert "models/me/refused" not in hub.repos


def test_a_download_that_breaks_off_is_continued(hub, tiny_pipeline, saved):
    push(saved, "me/flaky")
    hub.dropped.append(r"^GET /me/flaky/resolve/.*/model\.safetensors")
    loaded = HydraPipeline.from_pretrained("me/flaky")
    assert not hub.dropped
    assert_same_weights(tiny_pipeline.model, loaded.model)


def test_a_push_that_breaks_off_can_be_repeated(hub, saved):
    hub.dropped.append("^PUT /lfs")  # the client tries this again
    hub.dropped.append("^POST /api/models/me/flaky/commit")
    with pytest.raises(OSError, match="push again"):
        push(saved, "me/flaky")
    assert not hub.dropped
    with hub.recording() as requests:
        push(saved, "me/flaky")
    assert not [request for request in requests if request.startswith("PUT")]
    HydraPipeline.from_pretrained("me/flaky")


def test_adapters_come_back_as_they_were(hub, tiny_model, tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model, config)
    weights = {name: value.clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}
    adapted.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "me/adapter", base_model="me/base")
    files = hub.files("models/me/adapter")
    assert "configuration_hydra.py" not in files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "me/base")
    loaded = peft.PeftModel.from_pretrained(adapted.unload(), "me/adapter")
    assert peft.get_peft_model_state_dict(loaded).keys() == weights.keys()
    assert all(torch.equal(weights[n], v) for n, v in peft.get_peft_model_state_dict(loaded).items())


def test_data_is_read_from_where_it_was_pushed(hub, tmp_path, monkeypatch):
    import datasets

    from hydra_hf.data.sources import Source
    from hydra_hf.data.tables import open_source

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "data").mkdir()
    rows = [{"text": f"sentence {number}"} for number in range(5)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    push(tmp_path / "data", "me/sentences", repo_type="dataset")
    datasets.Dataset.from_list(rows[:3]).push_to_hub("me/shards")
    for name, number in (("sentences", 5), ("shards", 3)):
        source = Source(task="text", path=f"hub:me/{name}")
        assert len(open_source(source)) == number


def test_what_is_no_model_is_refused_before_the_hub_is_asked(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        push(tmp_path / "empty", "me/nothing")
    with pytest.raises(ValueError, match="There is no folder"):
        push(tmp_path / "absent", "me/nothing")
    with pytest.raises(ValueError, match="expected owner/name"):
        push(tmp_path / "empty", "a/b/c")
    assert not hub.requests


def test_the_command_draws_the_widgets_images(hub, saved, capsys):
    (saved / "scores.json").write_text(json.dumps({"t2i/colors": 0.25, "t2i/mean": 0.5, "vqa/color": 0.75, "seed": 0}))
    command = ["push", str(saved), "me/shown", "--prompt", "a cat", "--license", "apache-2.0", "--message", "shown"]
    assert main(command) == 0
    files = hub.files("models/me/shown")
    assert capsys.readouterr().out.strip().startswith(f"{hub.endpoint}/me/shown/commit/")
    assert files["samples/0.png"].startswith(b"\x89PNG")
    card = ModelCard(files["README.md"].decode())
    assert card.data.widget == [{"text": "a cat", "output": {"url": "samples/0.png"}}]
    assert (card.data.library_name, card.data.pipeline_tag) == ("hydra_hf", "any-to-any")
    assert card.data.license == "apache-2.0"
    found = {result.metric_type: (result.task_type, result.metric_value) for result in card.data.eval_results}
    assert found == {"t2i/mean": ("text-to-image", 0.5), "vqa/color": ("visual-question-answering", 0.75)}
    assert "hydra generate" in card.text


def test_a_card_that_is_there_keeps_its_text_and_gets_what_it_lacks(tmp_path):
    for name in ("README.md", "scores.json", "model/config.json"):
        shutil.copyfile(Path(TINY) / name, tmp_path / Path(name).name)
    write_card(tmp_path, "me/tiny", prompts=("a cat",))
    before, after = ModelCard.load(Path(TINY) / "README.md"), ModelCard.load(tmp_path / "README.md")
    assert after.text.strip() == before.text.strip()
    assert after.data.license == before.data.license == "apache-2.0"
    assert after.data.tags == [*before.data.tags]
    scores = {result.metric_type: result.metric_value for result in after.data.eval_results}
    measured = json.loads((tmp_path / "scores.json").read_text())
    assert scores["t2i/mean"] == pytest.approx(measured["t2i/mean"], abs=1e-4)
    assert not [name for name in scores if "phrasing" in name or "majority" in name]
    write_card(tmp_path, "me/tiny", license="mit")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.license == "mit"
    assert again.data.widget == after.data.widget


def test_a_card_has_the_scores_of_a_suites_result_as_of_a_flat_file(tmp_path):
    scores = {"t2i/colors": 0.25, "t2i/mean": 0.5, "vqa/color": 0.75, "geneval/overall": 0.1}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores | {"seed": 0, "num_questions": 8}))
    flat = read_scores(tmp_path)
    SuiteResult("toy", "me/model", scores, {"data": "toy world"}, {"seed": 0}, {"num_questions": 8}).save(path)
    assert read_scores(tmp_path) == flat == {"t2i/mean": 0.5, "vqa/color": 0.75}


def test_a_repo_is_pushed_again_without_its_code(hub, saved, tmp_path):
    push(saved, "me/one", prompts=("a cat",))
    downloaded = snapshot_download("me/one", local_dir=tmp_path / "one")
    push(downloaded, "me/two", code=False)
    files = hub.files("models/me/two")
    assert files["samples/0.png"] == hub.files("models/me/one")["samples/0.png"]
    assert not [name for name in files if name.endswith(".py")]
    assert not [name for name, contents in files.items() if b"hydra_remote" in contents]


def test_the_embedded_checkpoint_still_opens_as_it_is():
    """Folders for the components, which every earlier version wrote."""
    model = AutoModelForMultimodalLM.from_pretrained(TINY, subfolder="model")
    assert_same_weights(model, HydraPipeline.from_pretrained(TINY).model)
    assert subfolder_of(TINY, "model") == "model"


def test_auto_pipelines_that_were_imported_first_know_the_model_too(tiny_pipeline):
    from diffusers import AutoPipelineForImage2Image
    from diffusers.pipelines import auto_pipeline

    mappings = (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING)
    for mapping in mappings:
        mapping.pop("hydra", None)
    register()
    assert all(mapping["hydra"] is HydraPipeline for mapping in mappings)
    other = AutoPipelineForImage2Image.from_pipe(tiny_pipeline)
    assert other.model is tiny_pipeline.model
    assert other.config.default_guidance_scale == tiny_pipeline.config.default_guidance_scale


def test_a_push_leaves_the_folder_as_it_was(hub, saved):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    push(saved, "me/mine")
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    card = hub.files("models/me/mine")["README.md"].decode()
    assert card.endswith("# Mine\n")
    assert "license: mit" in card
    assert hub.files("models/me/mine")["model.safetensors"] == before[saved / "model" / "model.safetensors"]


def test_a_space_is_pushed_as_it_is(hub, tmp_path):
    (tmp_path / "app.py").write_text("print()")
    assert push(tmp_path, "me/page", repo_type="space").startswith(hub.endpoint)
    assert hub.files("spaces/me/page")["app.py"] == b"print()"
