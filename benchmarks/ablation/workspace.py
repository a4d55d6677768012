"""Where the ablation keeps what it makes, and how it runs the commands of `vispec`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ablation.arms import Arm, Cell
from examples.pair import ENVIRONMENT
from vllm_vispec.utils.errors import ViSpecError

LOG_TAIL = 3000


@dataclass(frozen=True)
class Workspace:
    """Paths below one folder."""

    root: Path

    def questions(self, data: str) -> Path:
        """Folder of a question set: questions.jsonl, images/ and answers.jsonl."""
        return self.root / "data" / data

    def samples(self, arm: Arm) -> Path:
        """What an arm trains on."""
        names = {"short": "questions.jsonl", "target": "answers.jsonl"}
        return self.questions(arm.data) / names[arm.answers]

    @property
    def held_out(self) -> Path:
        """Held-out questions with the target's greedy answers."""
        return self.questions("held_out") / "answers.jsonl"

    def cache(self, arm: Arm) -> Path:
        """Hidden states of an arm's samples, shared by all arms with the same ones."""
        return self.root / "cache" / f"{arm.data}-{arm.answers}"

    def run(self, arm: Arm, seed: int) -> Path:
        """Folder of a training run."""
        return self.root / "runs" / f"{arm.name}-s{seed}"

    def head(self, cell: Cell) -> Path:
        """Folder of a finished head."""
        return self.root / "heads" / cell.name

    def measured(self, cell: Cell) -> Path:
        """What the engine did with a head."""
        return self.root / "cells" / f"{cell.name}.json"

    def log(self, name: str) -> Path:
        """Output of a command."""
        return self.root / "logs" / f"{name}.log"


def run_vispec(arguments: Sequence[str], log: Path, threads: int) -> None:
    """Run a command of `vispec` in a process of its own.

    Raises:
        ViSpecError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = ENVIRONMENT | dict(os.environ)
    environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("a") as sink:
        command = [sys.executable, "-m", "vllm_vispec", *arguments]
        code = subprocess.run(command, stdout=sink, stderr=sink, env=environment).returncode
    if code:
        tail = log.read_text(errors="replace")[-LOG_TAIL:]
        raise ViSpecError(f"vispec {' '.join(arguments)} failed; the end of {log}:\n{tail}")
