"""Load single attention kernels out of vLLM's files, with stand-ins for what they import."""

from __future__ import annotations

import enum
import importlib.util
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

from tests.gpu.setup import NotRun, Setup


class _Platform:
    """Answers "no" to every question but the type of fp8."""

    @staticmethod
    def fp8_dtype() -> Any:
        import torch

        return torch.float8_e4m3fn

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: False


def load_triton_attention(setup: Setup) -> Any:
    """Return the module with vLLM's ``unified_attention``.

    Raises:
        NotRun: No folder was given, or Triton is missing.
    """
    folder = _folder(setup)
    if importlib.util.find_spec("triton") is None:
        raise NotRun("Triton is not installed")
    import triton
    from triton import language

    _put("vllm")
    _put("vllm.envs", VLLM_BATCH_INVARIANT=False)
    _put("vllm.logger", init_logger=logging.getLogger)
    _put("vllm.platforms", current_platform=_Platform())
    _put("vllm.triton_utils", tl=language, triton=triton)
    for package in ("vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops"):
        _put(package)
    operators = folder / "v1" / "attention" / "ops"
    text = (operators / "triton_unified_attention.py").read_text(encoding="utf-8")
    modes = sorted(set(re.findall(r"KVQuantMode\.([A-Z]\w+)", text)) - {"NONE"})
    _put("vllm.v1.kv_cache_interface", KVQuantMode=enum.IntEnum("M", ["NONE", *modes], start=0))
    _load("vllm.v1.attention.ops.triton_attention_helpers", operators)
    return _load("vllm.v1.attention.ops.triton_unified_attention", operators)


def load_flash_attention(setup: Setup) -> Any:
    """Return the module with vLLM's ``flash_attn_varlen_func``, FlashAttention 3 loaded.

    Raises:
        NotRun: No folder was given, it has no compiled library, or the device is another one.
    """
    import torch

    if not setup.on_gpu:
        raise NotRun("FlashAttention 3 needs a CUDA device")
    if torch.cuda.get_device_capability()[0] != 9:
        raise NotRun("FlashAttention 3 needs capability 9.x")
    folder = _folder(setup) / "vllm_flash_attn"
    libraries = sorted(folder.glob("_vllm_fa3_C*.so"))
    if not libraries:
        raise NotRun(f"{folder} has no _vllm_fa3_C library; take it from vLLM's CUDA wheel")
    torch.ops.load_library(str(libraries[0]))
    _put("vllm")
    _put("vllm.vllm_flash_attn", __path__=[])
    for name in ("_vllm_fa2_C", "_vllm_fa3_C"):
        _put(f"vllm.vllm_flash_attn.{name}")
    return _load("vllm.vllm_flash_attn.flash_attn_interface", folder)


def _folder(setup: Setup) -> Path:
    if setup.vllm is None:
        raise NotRun("needs vLLM's files: give --vllm FOLDER")
    return Path(setup.vllm)


def _put(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__path__ = []
    for key, value in content.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _load(name: str, folder: Path) -> Any:
    path = folder / f"{name.rpartition('.')[2]}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
