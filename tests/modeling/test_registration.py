import importlib
import json
import subprocess
import sys

import pytest
from tiny import hydra_config, hydra_model, tok_config, tok_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import hydra_hf
from hydra_hf import (
    HydraConfig,
    HydraForConditionalGeneration,
    HydraImageProcessor,
    HydraModel,
    HydraProcessor,
    HydraTokConfig,
    HydraTokModel,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
    VisionHeadConfig,
)


@pytest.fixture(scope="module")
def fresh_modules() -> set[str]:
    """What a fresh interpreter has loaded after `import hydra_hf`."""
    code = "import hydra_hf, sys; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "name",
    [
        "peft", "datasets", "gradio", "av", "diffusers.pipelines", "transformers.trainer", "skimage",
        "hydra_hf.pipelines", "hydra_hf.training", "hydra_hf.evaluation", "hydra_hf.data", "hydra_hf.cli",
    ],
)  # fmt: skip
def test_importing_the_package_does_not_load(fresh_modules, name):
    assert "hydra_hf.modeling.modeling_hydra" in fresh_modules
    assert name not in fresh_modules


@pytest.mark.parametrize(
    "cls", [HydraConfig, HydraTokConfig, VisionHeadConfig, PixelFlowDecoderConfig, PixelViTDecoderConfig]
)
def test_auto_config_knows_every_config(cls):
    assert type(AutoConfig.for_model(cls.model_type)) is cls


def test_the_auto_models_know_the_classes():
    assert type(AutoModel.from_config(tok_config())) is HydraTokModel
    assert type(AutoModel.from_config(hydra_config())) is HydraModel
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto_class.from_config(hydra_config())) is HydraForConditionalGeneration


def test_the_auto_processors_open_a_saved_model_folder(tmp_path, tiny_processor):
    hydra_config().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is HydraProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is HydraImageProcessor


def test_the_image_processor_of_a_tokenizer_opens_by_its_config(tmp_path):
    tok_config().save_pretrained(tmp_path)
    HydraImageProcessor(patch_size=4).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is HydraImageProcessor


def test_a_fresh_process_opens_a_checkpoint_after_the_import(tmp_path):
    hydra_model().save_pretrained(tmp_path)
    code = (
        "import hydra_hf; from transformers import AutoModelForImageTextToText as Auto;"
        f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["HydraForConditionalGeneration"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("modeling_hydra", "PreTrainedModel"),
        ("modeling_hydra_tok", "PreTrainedModel"),
        ("processing_hydra", "ProcessorMixin"),
    ],
)
def test_diffusers_finds_the_base_class_where_it_looks(module, name):
    """A pipeline is loaded by the base classes that it finds in the module of a component's class."""
    assert hasattr(importlib.import_module(f"hydra_hf.modeling.{module}"), name)


@pytest.mark.parametrize("build", [hydra_model, tok_model])
def test_saved_configs_name_no_remote_code(tmp_path, build):
    model = build()
    for cls in (type(model), type(model.config)):
        cls.register_for_auto_class()  # what loading through a shim does
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))


def test_a_saved_processor_names_no_remote_code(tmp_path, tiny_processor):
    type(tiny_processor).register_for_auto_class()
    tiny_processor.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.glob("*.json") if "auto_map" in path.read_text()]
    assert not list(tmp_path.glob("*.py"))


def test_every_public_name_exists_and_is_listed():
    for name in hydra_hf.__all__:
        assert name in dir(hydra_hf)
        assert getattr(hydra_hf, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'HydraTurbo'"):
        hydra_hf.HydraTurbo
