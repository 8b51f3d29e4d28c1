import os
import signal
import subprocess
import sys
import threading

import pytest
from accelerate import Accelerator

from hydra_hf.training.interruption import StopRequest, TrainingInterruptedError


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert stop.agreed(Accelerator(cpu=True)) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher does at once: the first counts
        assert stop.agreed(Accelerator(cpu=True)) == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_later_ends_the_process():
    program = (
        "import os, signal; from hydra_hf.training import interruption; interruption.SECONDS_OF_ONE = -1.0\n"
        "with interruption.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('noted', flush=True); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted\n")


def test_another_thread_trains_without_handlers():
    failures = []

    def enter() -> None:
        try:
            with StopRequest():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures


def test_the_sentence_names_step_and_signal():
    error = TrainingInterruptedError("stage1", 40, signal.SIGINT)
    assert str(error) == "stage1 stopped at step 40 by SIGINT; the same command resumes it."


@pytest.mark.slow  # three runs of the command line
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_of_the_command_line_that_is_asked_to_stop_loses_nothing(tmp_path, name, code):
    command = [sys.executable, "-m", "hydra_hf.cli", "train", "tiny.tokenizer", "--stage", "foundation", "--num_steps", "40",
               "--out"]  # fmt: skip
    stopped = subprocess.Popen(
        [*command, str(tmp_path / "stopped")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for character in iter(lambda: stopped.stderr.read(1), ""):  # the progress bar: steps have begun
        if character == "%":
            break
    stopped.send_signal(getattr(signal, name))
    _, errors = stopped.communicate(timeout=300)
    last = errors.splitlines()[-1]
    assert stopped.returncode == code, errors
    assert last.startswith("hydra train: foundation stopped at step ")
    assert last.endswith(f"by {name}; the same command resumes it.")
    assert "Traceback" not in errors
    assert not (tmp_path / "stopped" / "foundation" / "final").exists()
    for folder in ("stopped", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], check=True, capture_output=True)
    weights = [
        (tmp_path / folder / "foundation/final/model.safetensors").read_bytes() for folder in ("stopped", "whole")
    ]
    assert weights[0] == weights[1]
