"""The supported versions of other libraries: what is pinned, and that the embedded checkpoint does the same with all of them.

`python tests/test_versions.py` writes the reference anew, for new weights.
"""

import hashlib
import json
import re
import warnings
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hydra_hf
from hydra_hf import HydraPipeline


ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).with_name("hydra-tiny-reference.json")
PROMPT, QUESTION = "two apples", "what is in the picture?"
GRID = 8  # the picture is compared as the means of 8 x 8 squares


def weights_of_the_checkpoint() -> str:
    return hashlib.sha256((Path(hydra_hf.TINY) / "model" / "model.safetensors").read_bytes()).hexdigest()


def picture_and_answer() -> dict:
    """The picture of the prompt, coarsely, in [0, 1]; and the ids of the answer to a question about it."""
    pipeline = HydraPipeline.from_pretrained(hydra_hf.TINY)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt").images
    content = [{"type": "image", "image": image[0] * 2 - 1}, {"type": "text", "text": QUESTION}]
    inputs = pipeline.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids = pipeline.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return {
        "picture": torch.nn.functional.adaptive_avg_pool2d(image[0], GRID).tolist(),
        "answer": ids[0, inputs["input_ids"].shape[1] :].tolist(),
    }


@pytest.mark.smoke
def test_every_version_draws_and_answers_the_same():
    reference = json.loads(REFERENCE.read_text())
    assert reference["weights"] == weights_of_the_checkpoint(), "new weights: run python tests/test_versions.py"
    drawn = picture_and_answer()
    assert drawn["answer"] == reference["answer"]
    np.testing.assert_allclose(drawn["picture"], reference["picture"], rtol=0, atol=1e-4)


HARNESSES = ("lmms_eval", "vlmevalkit", "evalscope")  # extras that exclude versions which the others use


def requirements() -> dict[str, Requirement]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [names for extra, names in setup["options.extras_require"].items() if extra not in HARNESSES]
    lines = "\n".join([setup["options"]["install_requires"], *extras]).splitlines()
    return {each.name: each for each in map(Requirement, filter(None, lines)) if each.name != "hydra_hf"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_requirement_is_pinned_inside_its_range_and_torch_is_not():
    # torch fits the machine; no command of the README installs pybullet
    free = {"torch", "torchvision", "pybullet"}
    assert {name for name in requirements() if name not in pins()} == free
    for name, pin in pins().items():
        assert name == "torch-fidelity" or not re.match("torch|triton|nvidia|cuda", name)
        assert name not in requirements() or pin in requirements()[name].specifier


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_the_installed_version_is_one_that_setup_cfg_admits(name):
    assert version(name) in requirements()[name].specifier


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_the_readme_tells_the_tested_range(name):
    low, high = re.search(rf"{name} ([\d.]+) to ([\d.]+)", (ROOT / "README.md").read_text(encoding="utf-8")).groups()
    major, minor = high.split(".")
    assert requirements()[name].specifier == SpecifierSet(f">={low},<{major}.{int(minor) + 1}")


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["hydra_hf.cli", "test_versions"])
def test_a_deprecated_call_of_ours_is_an_error(category, module):
    with pytest.raises(category):
        warnings.warn_explicit("use another name", category, "file.py", 1, module=module)


if __name__ == "__main__":
    REFERENCE.write_text(json.dumps({"weights": weights_of_the_checkpoint(), **picture_and_answer()}) + "\n")
