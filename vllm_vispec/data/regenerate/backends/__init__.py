"""Where answers come from: `offline`, `server` and `ray`, in a registry.

Names map to "module:class", so that nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError


class Backend(Protocol):
    """Answers conversations; built from the settings, which may take long."""

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Regenerated | Rejected]:
        """Yield each conversation's result as soon as it is there, in any order.

        Raises:
            ViSpecError: the backend as a whole cannot go on.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "offline": "vllm_vispec.data.regenerate.backends.offline:OfflineBackend",
        "server": "vllm_vispec.data.regenerate.backends.server:ServerBackend",
        "ray": "vllm_vispec.data.regenerate.backends.ray_data:RayBackend",
    }
)


def make_backend(name: str, settings: RegenerateSettings) -> Backend:
    """Build a backend by its name.

    Raises:
        ViSpecError: the name is unknown or the backend does not start.
    """
    if name not in BACKENDS:
        raise ViSpecError(f"backend {name}: choose one of {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(settings)
    return backend
