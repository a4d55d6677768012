"""Where a part of `tests.gpu.bare` runs, and how it says that it cannot."""

from __future__ import annotations

from typing import NamedTuple


class NotRun(Exception):
    """The part needs something that is not here; the message says what."""


class Setup(NamedTuple):
    """Where a part runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        vllm: Folder with vLLM's files, None without.
    """

    device: str
    vllm: str | None

    @property
    def on_gpu(self) -> bool:
        """Whether sizes are real ones and times mean something."""
        return self.device == "cuda"
