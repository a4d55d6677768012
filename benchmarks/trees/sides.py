"""Engines of this benchmark as sides of a comparison, and what they say of their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.job import Job
from examples.demo.side import Side

WORKER = "benchmarks.trees.worker"


@dataclass(frozen=True)
class Memory:
    """What a tree takes: percent of the KV cache on top, and buffers in MiB."""

    kv_percent: float
    buffers_mib: float


@dataclass(frozen=True)
class Reply:
    """What an engine did with samples that arrived together; see `worker.BatchEngine.reply`."""

    token_ids: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]
    decode_seconds: float
    wall_seconds: float

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Reply:
        """Read what the worker wrote."""
        answers = fields["answers"]
        return cls(
            tuple(tuple(answer["token_ids"]) for answer in answers),
            tuple(tuple(answer["accepted"]) for answer in answers),
            fields["decode_seconds"],
            fields["wall_seconds"],
        )


class BatchSide(Side):
    """A side that answers several samples at a time and says what its tree takes in memory."""

    def __init__(self, name: str, job: Job, log_file: Path, threads: int = 1) -> None:
        super().__init__(name, job, log_file, threads, WORKER)

    def __enter__(self) -> BatchSide:
        super().__enter__()
        return self

    def ask(self, samples: Sequence[int], temperature: float) -> Reply:
        """Have samples answered together."""
        request = {"samples": list(samples), "temperature": temperature}
        return Reply.from_json(self.request(request))

    def memory(self) -> Memory | None:
        """What the engine's tree takes; None without a tree."""
        fields = self.request({"memory": True})["memory"]
        return None if fields is None else Memory(**fields)
