"""`hydra serve` as a process: it answers, ends on SIGTERM, and says what is wrong with its options."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest


pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
COMMAND = [sys.executable, "-m", "hydra_hf.cli", "serve"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_command_serves_the_embedded_checkpoint_until_it_is_ended():
    port = free_port()
    command = [*COMMAND, "--port", str(port), "--served_model_name", "tiny", "--max_n", "1"]
    process = subprocess.Popen(
        command, env={**os.environ, "HYDRA_API_KEY": "secret"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert f"tiny at http://127.0.0.1:{port}/v1" in process.stdout.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                assert [model.id for model in client.models.list()] == ["tiny"]
                break
            except openai.APIConnectionError:
                time.sleep(0.1)
        with pytest.raises(openai.BadRequestError, match="at most 1"):
            client.images.generate(model="tiny", prompt="a cat", n=2)
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def test_a_wrong_limit_is_one_line(capsys):
    from hydra_hf.cli import main

    assert main(["serve", "--max_queue", "0"]) == 2
    assert "max_queue=0" in capsys.readouterr().err
