"""A repo with its own code, opened where this package cannot be imported."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

import hub_server
from hydra_hf.publishing.push import push
from hydra_hf.publishing.remote_code import add_remote_code, remote_files


NOT_INSTALLED = """
    import sys

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hydra_hf":
                raise ModuleNotFoundError(f"No module named {name!r}")

    sys.meta_path.insert(0, NotInstalled())
"""


def run_without_the_package(hub, code: str, folder: Path) -> str:
    """The output of a fresh interpreter that is online with an empty cache; nothing of this package can be imported."""
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": hub_server.TOKEN}
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_CACHE")}
    environment |= {**home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    result = subprocess.run(
        [sys.executable, "-c", dedent(NOT_INSTALLED) + dedent(code)], cwd=folder, env=environment,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def saved(tiny_pipeline, tmp_path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.slow
def test_a_repo_works_where_nothing_is_installed(hub, tiny_pipeline, saved, tmp_path):
    push(saved, "me/code")
    tiny_pipeline.model.model.vision_tower.save_pretrained(tmp_path / "tok")
    tiny_pipeline.processor.image_processor.save_pretrained(tmp_path / "tok")
    push(tmp_path / "tok", "me/tok")
    code = """
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            AutoModelForMultimodalLM.from_pretrained("me/code", trust_remote_code=False)
            raise SystemExit("it opened without being trusted")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error

        trusted = {"trust_remote_code": True}
        model = AutoModelForMultimodalLM.from_pretrained("me/code", **trusted)
        processor = AutoProcessor.from_pretrained("me/code", **trusted)
        for auto in (AutoModel, AutoModelForImageTextToText):
            assert type(auto.from_pretrained("me/code", **trusted)).__module__ == type(model).__module__

        tower = AutoModel.from_pretrained("me/tok", **trusted)
        images = AutoImageProcessor.from_pretrained("me/tok", **trusted)
        assert images(torch.zeros(3, 32, 32), return_tensors="pt")["image_grid_thw"].tolist() == [[1, 4, 4]]
        assert tower.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode().shape == (1, 4, 4, 4)

        HydraPipeline = get_class_from_dynamic_module("hydra_remote.HydraPipeline", "me/code")
        drawn = HydraPipeline.from_pretrained("me/code")
        assert type(drawn.model) is type(model)
        generator = torch.Generator().manual_seed(0)
        torch.save(drawn("a cat", generator=generator, output_type="pt").images, "image.pt")

        draw = pipeline("any-to-any", "me/code", **trusted)
        chat = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
        settings = {"num_inference_steps": 2, "generator": generator}
        image = draw(chat, generation_mode="image", generate_kwargs=settings)[0]["generated_image"]
        assert image.size == (32, 32), image.size
        ask = pipeline("image-text-to-text", "me/code", **trusted)
        question = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what"}]}]
        print(type(ask(text=question, max_new_tokens=2)[0]["generated_text"]).__name__)

        model.save_pretrained("again")
        processor.save_pretrained("again")
        again = AutoModelForMultimodalLM.from_pretrained("again", **trusted)
        assert type(again).__name__ == type(model).__name__
        assert AutoProcessor.from_pretrained("again", **trusted).patch_size == processor.patch_size
        assert not [name for name in sys.modules if name.split(".")[0] == "hydra_hf"]
    """
    assert run_without_the_package(hub, code, tmp_path).split() == ["list"]
    expected = tiny_pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), expected, atol=1e-5, rtol=1e-5)


def test_the_code_imports_its_neighbours_alone():
    files = remote_files()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                assert f"{node.module}.py" in files, (name, node.module)
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(found.split(".")[0] == "hydra_hf" for found in names), name


def test_the_code_needs_no_package_that_is_an_extra():
    """transformers refuses a repo whose code imports what is not installed, also inside of functions."""
    from transformers.dynamic_module_utils import get_imports

    base = {
        "torch",
        "torchvision",
        "transformers",
        "diffusers",
        "huggingface_hub",
        "numpy",
        "PIL",
        *sys.stdlib_module_names,
    }
    for path in Path(sys.modules["hydra_hf"].__file__).parent.glob("modeling/*.py"):
        assert set(get_imports(path)) <= base, path.name


def test_with_the_package_imported_its_own_classes_win(hub, tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is type(tiny_model)


def test_what_is_saved_again_names_no_code_that_is_not_there(tiny_model, tiny_processor, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_model.save_pretrained(first)
    tiny_processor.save_pretrained(first)
    add_remote_code(first)
    AutoModelForMultimodalLM.from_pretrained(first).save_pretrained(second)
    AutoProcessor.from_pretrained(first).save_pretrained(second)
    for name in ("config.json", "processor_config.json"):
        assert "hydra_remote" in (first / name).read_text()
        assert "hydra_remote" not in (second / name).read_text()


def test_a_config_of_another_model_is_refused(tmp_path):
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='qwen2', expected one of"):
        add_remote_code(tmp_path)
