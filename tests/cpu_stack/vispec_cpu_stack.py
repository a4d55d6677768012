"""Start-up shim of the CPU test stack, imported by a ``.pth`` file in every Python process.

Two parts of the pinned stack do not fit together without a GPU, and both have to be mended before
vLLM is imported, also in the processes that vLLM spawns:

* The published torchvision wheel is built for CUDA, so on a CPU torch its extension does not load
  and its own start-up then fails on operators that do not exist. Their schemas are declared here.
* vLLM takes Triton only if Triton lists a backend for the platform, and the wheel has none for the
  CPU. For the V2 model runner, run through Triton's interpreter, a stand-in is listed.

The interpreter also prepares Triton's language anew for every launch and every nested call, and
checks every sum of integers for overflow: half of its time. Here the language is prepared once, and
overflow is left to wrap, as on a GPU.

Nothing is imported here at interpreter start: an import hook waits for the modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_TORCHVISION_OPS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []  # a torch.library.Library must stay alive


def _declare_torchvision_ops() -> None:
    """Declare the operators that torchvision's compiled extension would have declared."""
    import torch

    missing = [op for op in _TORCHVISION_OPS if not hasattr(torch.ops.torchvision, op)]
    if not missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in missing:
        library.define(_TORCHVISION_OPS[op])
    _libraries.append(library)


def _list_cpu_backend() -> None:
    """List a CPU backend in Triton that says it is there; only the interpreter ever runs."""
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        """Never drives a device; ``is_active`` is all that is asked of it."""

        @staticmethod
        def is_active() -> bool:
            return False

    backends.setdefault("cpu", Backend(compiler=BaseBackend, driver=InterpreterDriver))


def _quicken_interpreter() -> None:
    """Let the interpreter replace the language's functions once, and not check for overflow."""
    from dataclasses import replace

    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    prepare = interpreter._patch_lang
    prepared: set[frozenset[int]] = set()

    def prepare_once(function: Any) -> Any:
        languages = (interpreter.tl, interpreter.tl.core)
        found = frozenset(
            index
            for index, language in enumerate(languages)
            if any(value is language for value in function.__globals__.values())
        )
        if found not in prepared:
            prepare(function)
            prepared.add(found)
        # Nothing in it, so nothing to restore when the launch ends.
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare_once


class _Hook:
    """Meta path finder that runs callbacks around the first import of chosen modules."""

    def __init__(self) -> None:
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name not in self.before and name not in self.after:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                self._wrap(name, spec.loader)
                return spec
        return None

    def _wrap(self, name: str, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            self.before.get(name, _nothing)()
            run(module)
            self.after.get(name, _nothing)()

        loader.exec_module = exec_module


def _nothing() -> None:
    pass


def _install() -> None:
    hook = _Hook()
    # This module is imported right after torchvision has tried to load its extension.
    hook.before["torchvision._meta_registrations"] = _declare_torchvision_ops
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        hook.after["triton.backends"] = _list_cpu_backend
        hook.after["triton.runtime.interpreter"] = _quicken_interpreter
    sys.meta_path.insert(0, hook)


_install()
