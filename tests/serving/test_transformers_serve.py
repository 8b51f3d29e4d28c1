"""`transformers serve` serves the embedded checkpoint too: a flat folder, and a process that has imported hydra_hf."""

import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from test_server import with_image
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from hydra_hf import TINY
from hydra_hf.pipelines.dialogue import reply


pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
serve = pytest.importorskip("transformers.cli.serve")


@pytest.fixture
def flat_folder(tmp_path) -> Path:
    """Model and processor next to each other, as transformers expects them."""
    for part in ("model", "processor"):
        shutil.copytree(Path(TINY) / part, tmp_path / "hydra-tiny", dirs_exist_ok=True)
    return tmp_path / "hydra-tiny"


def test_transformers_serve_answers_as_the_model(flat_folder, pipeline, monkeypatch):
    monkeypatch.setitem(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "hydra", "HydraForConditionalGeneration")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = serve.Serve(
        force_model=str(flat_folder), device="cpu", dtype="float32", host="127.0.0.1", port=port, non_blocking=True
    )
    try:
        while not server.server.started:
            time.sleep(0.05)
        picture = pipeline("two apples", num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images[0]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
        content = with_image(picture, "what is in the picture?")
        messages = [{"role": "user", "content": content}]
        options = {"model": str(flat_folder), "messages": messages, "temperature": 0, "max_tokens": 16}
        answer = client.chat.completions.create(**options).choices[0].message.content
        streamed = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**options, stream=True)
            if chunk.choices
        )
    finally:
        server.kill_server()
    own = [{"role": "user", "content": [{"type": "image", "image": picture}, content[1]]}]
    expected = reply(pipeline.model, pipeline.processor, own, max_new_tokens=16)[0]["text"]
    assert answer == expected
    assert streamed == expected
