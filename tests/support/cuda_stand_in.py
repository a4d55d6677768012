"""vLLM's CUDA platform and backends in a process without CUDA: what is chosen, nothing that runs.

Compiled libraries and FlashInfer are replaced by objects that take every call, so that vLLM's own
Python code decides: which backend serves a layer, whether its implementation and its metadata
builder can be made, and what sizes they have.  Install it before anything of vLLM is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

COMPILED = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._qutlass_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
ASKED_AT_IMPORT = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
)
NUM_COMPUTE_UNITS = 132
MEMORY = 80 << 30
_alive: list[torch.library.Library] = []


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the compiled libraries and FlashInfer."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in COMPILED or name.split(".")[0] == "flashinfer":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        module.__file__, module.__version__ = "stand-in", "0.7.2"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _define_operators() -> list[torch.library.Library]:
    """Define the operators that vLLM calls while it is imported; they say that nothing is there."""
    library = torch.library.Library("_C", "FRAGMENT")
    for name in ASKED_AT_IMPORT:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: False, "CompositeExplicitAutograd")
    return [library]


def install() -> Any:
    """Make vLLM's platform a CUDA one; returns it, whose ``capability`` can be set."""
    sys.meta_path.insert(0, _StandIns())
    _alive.extend(_define_operators())
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class StandIn(CudaPlatformBase):
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "stand-in"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return NUM_COMPUTE_UNITS

        @classmethod
        def device_count(cls) -> int:
            return 1

    vllm.platforms._current_platform = StandIn()
    from vllm.vllm_flash_attn import flash_attn_interface

    # A file of the CUDA wheel alone; nothing imports it before a kernel is compiled.
    flash_attn_interface.FA4_AVAILABLE = True
    return StandIn
