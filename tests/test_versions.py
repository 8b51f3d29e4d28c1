"""The embedded checkpoint answers and draws the same with every supported version of transformers and diffusers.

`python tests/test_versions.py` writes the reference anew, for new weights.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hydra_hf
from hydra_hf import HydraPipeline


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


if __name__ == "__main__":
    REFERENCE.write_text(json.dumps({"weights": weights_of_the_checkpoint(), **picture_and_answer()}) + "\n")
