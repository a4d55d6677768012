"""What is looked at before a server is started."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.sides import SIDES
from vllm_vispec.compat.check import group_problem
from vllm_vispec.compat.groups import BENCH
from vllm_vispec.utils.errors import ViSpecError

PACKAGES = {"vllm": "vllm", "pandas": "pandas (vllm[bench])"}


def check_inputs(settings: MatrixSettings) -> None:
    """Refuse what would let a run fail after minutes.

    Raises:
        ViSpecError: a package is missing, vLLM is another than this was written for, or the target
            or a head is not there or not usable.
    """
    for module, name in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ViSpecError(f"vllm bench serve needs {name}: install it here")
    # Which model runner the servers take is theirs to say.
    problems = [group_problem(BENCH, "v2"), group_problem(BENCH, "v1")]
    if all(problems):
        raise ViSpecError(problems[0])
    _check_folder("--target", settings.target)
    needed = {option for side in settings.sides for option in SIDES[side].needs}
    if "--head" in needed and settings.head:
        _check_head(settings)
    if "--eagle-head" in needed and settings.eagle_head:
        _check_folder("--eagle-head", settings.eagle_head)


def _check_folder(flag: str, name: str) -> None:
    """Refuse a path to nothing; hub ids are left to vLLM."""
    path = Path(name).expanduser()
    looks_like_path = path.is_absolute() or name.startswith(("./", "../", "~")) or path.exists()
    if looks_like_path and not (path / "config.json").is_file():
        raise ViSpecError(f"{flag} {name} has no config.json: give a model's folder or hub id")
    if not looks_like_path and name.count("/") > 1:
        raise ViSpecError(f"{flag} {name} does not exist: give a model's folder or hub id")


def _check_head(settings: MatrixSettings) -> None:
    from vllm_vispec.heads import inspect_head

    assert settings.head is not None
    info = inspect_head(settings.head)
    if "vispec_zeroed" in settings.sides and not info.config.has_adaptor:
        raise ViSpecError(
            f"--head {settings.head} has no vision adaptor to be zeroed: leave "
            "vispec_zeroed out of --sides"
        )
