"""Releases the matrices of vLLM's CPU backend while models are traced, too (V1 runner).

In 0.32 and 0.33 a handler of oneDNN reads a tensor when it is collected. If that happens while
torch.compile traces a model, the tensor meets fake ones: the handler's memory is lost and a
traceback of dozens of lines is printed, for every linear layer of a model that was dropped.
"""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes


def release(original: Callable[[Any], None], handler: Any) -> None:
    """Stands for ``CPUDNNLGEMMHandler.__del__``: as that, outside of any tracing."""
    with _disable_current_modes():
        original(handler)
