"""A copy of the installed vLLM from which files are missing, as they may be in a later release.

Files are links, so a copy costs a second. Put first on ``PYTHONPATH`` of a fresh process it is the
vLLM there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

# Both runners, and the scheduler, use these parts of the V1 runner's folder.
_SHARED = ("__init__", "metadata", "metrics", "utils")
V1_RUNNER = ("v1/worker/gpu_model_runner.py", "v1/worker/cpu_model_runner.py", "v1/spec_decode/")
V1_KEPT = tuple(f"v1/spec_decode/{name}.py" for name in _SHARED)
# vLLM's worker on CPUs imports both runners, whichever it takes.
V1_IMPORT = (
    "from vllm.v1.worker.cpu_model_runner import CPUModelRunner",
    "CPUModelRunner = None",
)
V2_RUNNER = ("v1/worker/gpu/model_runner.py", "v1/worker/gpu/spec_decode/")
# V1's proposers import models, one of which imports this.
V2_KEPT = tuple(
    f"v1/worker/gpu/spec_decode/{name}.py"
    for name in ("__init__", "eagle/__init__", "eagle/eagle3_utils")
)

# The workers' warm-up imports V2's, whichever runner is taken.
V2_IMPORT = (
    "from vllm.v1.worker.gpu.model_runner import GPUModelRunner",
    "GPUModelRunner = None",
)


def without_v1_runner(folder: Path) -> Path:
    """Write vLLM without the V1 model runner and its proposers; returns what to import from."""
    kept = {*V1_KEPT, "v1/spec_decode/dynamic/"}
    return _copy(folder, V1_RUNNER, kept, {"v1/worker/cpu_worker.py": V1_IMPORT})


def without_v2_runner(folder: Path) -> Path:
    """Write vLLM without the V2 model runner and its speculators; returns what to import from."""
    return _copy(folder, V2_RUNNER, V2_KEPT, {"v1/worker/gpu/warmup.py": V2_IMPORT})


def _copy(
    folder: Path,
    gone: Collection[str],
    kept: Collection[str],
    edits: Mapping[str, tuple[str, str]],
) -> Path:
    """Link all of vLLM but what is gone.

    Args:
        folder: Where to write.
        gone: Files, and folders with a slash behind them, relative to the package.
        kept: What stays of them.
        edits: Text and its replacement, by file.
    """
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)))
    for root, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            relative = (Path(root) / name).relative_to(source)
            if _listed(relative, gone) and not _listed(relative, kept):
                continue
            place = folder / "vllm" / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            edit = edits.get(relative.as_posix())
            if edit is None:
                place.symlink_to(Path(root) / name)
                continue
            text = (Path(root) / name).read_text(encoding="utf-8")
            assert edit[0] in text, relative
            place.write_text(text.replace(*edit), encoding="utf-8")
    return folder


def _listed(path: Path, names: Collection[str]) -> bool:
    text = path.as_posix()
    return any(text.startswith(name) if name.endswith("/") else text == name for name in names)
