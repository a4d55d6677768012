"""Where a part of `tests.gpu.bare` runs, and how it says that it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

TREE: Any = SimpleNamespace(
    policy="eagle2", depth=3, top_k=8, width=8, levels=4, num_channels=20, least_probability=0.0
)
"""The default `TreeSettings`, without pydantic. A test compares them."""


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
