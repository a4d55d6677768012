"""Why an engine did not start, in one line: what vLLM prints, and what is made of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_vispec.utils.engine_start import (
    find_cause,
    spelled_as_json,
    spelled_as_option,
    starting_engine,
    why,
)
from vllm_vispec.utils.errors import ViSpecError

ENGINE = spelled_as_json("--engine")
WORKER = "(VllmWorker-0 pid=12) ERROR 11-30 07:28:13 [multiproc_executor.py:953] "
CORE = "(EngineCore pid=7) ERROR 11-30 07:28:16 [core.py:1510] "
CPU_MEMORY = (
    "ValueError: Available memory on node 0 (10.31/15.71 GiB) on startup is less than desired CPU "
    "memory utilization (0.99, 15.56 GiB). On the CPU backend, the `--gpu-memory-utilization` flag "
    "controls the fraction of CPU memory reserved (despite its name)."
)
GPU_MEMORY = (
    "ValueError: Free memory on device cuda:0 (40.0/80.0 GiB) on startup is less than desired GPU "
    "memory utilization (0.92, 73.6 GiB). Decrease GPU memory utilization or reduce GPU memory "
    "used by other processes."
)
CACHE = (
    "ValueError: To serve at least one request with the model's max seq len (4096), (2.0 GiB KV "
    "cache is needed, which is larger than the available KV cache memory (1.0 GiB). Based on the "
    "available memory, the estimated maximum model length is 2048. Try increasing "
    "`gpu_memory_utilization`."
)


def log_of(error: str) -> str:
    """A worker's traceback, then those of the processes that waited for it."""
    waiting = (
        "Exception: WorkerProc initialization failed due to an exception in a background process. "
        "See stack trace for root cause."
    )
    failed = "RuntimeError: Engine core initialization failed. See root cause above."
    lines = ["INFO 11-30 07:28:00 [model.py:733] Resolved architecture: X"]
    for prefix, end in ((WORKER, error), (CORE, waiting), ("", failed)):
        lines += [f"{prefix}Traceback (most recent call last):", f'{prefix}  File "x.py", line 1']
        lines += [f"{prefix}    raise ValueError(", f"{prefix}{end}"]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "end",
    [
        "SystemExit: 1",
        "SystemExit",
        "KeyboardInterrupt: terminated",
        "torch.distributed.DistBackendError: [2] recv failed: Connection reset by peer",
    ],
)
def test_processes_that_are_ended_after_the_cause(end: str) -> None:
    """With several workers the one that failed speaks first."""
    other = WORKER.replace("-0", "-1")
    text = f"{WORKER}{CACHE}\n{other}Traceback (most recent call last):\n{other}{end}"
    assert why(text, ENGINE).startswith("To serve at least one request")
    assert find_cause(f"{other}{end}").endswith(end)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            CPU_MEMORY,
            'lower gpu_memory_utilization (e.g. --engine \'{"gpu_memory_utilization": 0.62',
        ),
        (
            GPU_MEMORY,
            'lower gpu_memory_utilization (e.g. --engine \'{"gpu_memory_utilization": 0.47',
        ),
        (CACHE, "lower max_model_len (e.g. --engine '{\"max_model_len\": 2048}'), or raise gpu_"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "max_num_seqs"),
        ("OSError: no/such is not a valid model identifier listed on x", "check the name of the"),
    ],
)
def test_cause_and_remedy(error: str, said: str) -> None:
    for text in (log_of(error), error):
        line = why(text, ENGINE)
        assert line.startswith(error.partition(": ")[2][:18])
        assert said in line
        assert "\n" not in line
        assert "background process" not in line


def test_options_of_the_server() -> None:
    assert "(e.g. --gpu-memory-utilization 0.47)" in why(GPU_MEMORY, spelled_as_option)


REFUSED = "vllm_vispec.utils.errors.ViSpecError: worker on node7: head 'a/b' is no local folder"
PYDANTIC = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, No model architectures are specified [type=value_error, input_value=X]
    For further information visit https://errors.pydantic.dev"""
CHAIN = "KeyError: 3\n\nThe above exception was the direct cause\n\nOSError: no such model"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("INFO x\nvllm-vispec: tree.width is unknown\n", "tree.width is unknown"),
        (log_of(REFUSED), REFUSED.partition(": ")[2]),
        (PYDANTIC, "No model architectures are specified"),
        # The last of a chain was worded for users.
        (CHAIN, "no such model"),
        # Errors without words keep their class.
        *((log_of(error), error) for error in ("KeyError: 'x'", "AssertionError", "TypeError: x")),
        ("", "it said nothing"),
        ("Killed\n", "Killed"),
    ],
)
def test_cause(text: str, cause: str) -> None:
    assert find_cause(text) == cause


def _child(text: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sys; print({text!r}, file=sys.stderr)"])


def _start_and_fail(text: str, error: Exception) -> None:
    with starting_engine("target", ENGINE):
        _child(text)
        raise error


def test_a_failed_start_shows_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    waited = RuntimeError("Engine core initialization failed. See root cause above.")
    with pytest.raises(ViSpecError) as caught:
        _start_and_fail(log_of(GPU_MEMORY), waited)
    said = str(caught.value)
    assert said.startswith("the engine does not start with target target: Free memory on device")
    assert "\n" not in said
    log = said.rpartition("(whole log: ")[2].removesuffix(")")
    with open(log) as file:
        assert "Traceback" in file.read()
    os.unlink(log)
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


def test_a_start_that_works_shows_everything(capfd: pytest.CaptureFixture[str]) -> None:
    with starting_engine("target", ENGINE):
        _child("a warning")
        os.write(1, b"a line of this process\n")
        assert capfd.readouterr().err == ""
    late = subprocess.run([sys.executable, "-c", "print('later')"], check=True)
    assert late.returncode == 0
    shown = capfd.readouterr()
    assert "a warning" in shown.err
    assert "a line of this process" in shown.err
    assert "later" in shown.out


def test_a_refusal_stays_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ViSpecError, match=r"^wrong$"):
        _start_and_fail("noise", ViSpecError("wrong"))
    assert "noise" not in capfd.readouterr().err
