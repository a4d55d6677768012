"""The page on trees says what heads become on every attention backend; vLLM's classes decide."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vllm_vispec.models.padded_heads import BackendFinder, choose_padded_head
from vllm_vispec.trees.codes import num_channels
from vllm_vispec.trees.settings import TreeSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trees.md"
SECTION = re.compile(r"(<!-- head sizes: [^>]*-->\n).*?(<!-- /head sizes -->)", re.DOTALL)
HEAD_SIZES = (64, 80, 96, 128)
DEPTHS = (3, 5, 7)
# Name for --attention-backend, module, class and where it was seen to run with trees.
BACKENDS: Mapping[str, tuple[str, str, str]] = {
    "CPU_ATTN": ("cpu_attn", "CPUAttentionBackend", "tested (float32, bfloat16)"),
    "FLASH_ATTN": ("flash_attn", "FlashAttentionBackend", "untested"),
    "TRITON_ATTN": ("triton_attn", "TritonAttentionBackend", "untested"),
    "FLEX_ATTENTION": ("flex_attention", "FlexAttentionBackend", "untested"),
    "ROCM_ATTN": ("rocm_attn", "RocmAttentionBackend", "untested"),
    "ROCM_AITER_FA": ("rocm_aiter_fa", "AiterFlashAttentionBackend", "untested"),
}


def _padded(backend: Any, head_size: int, depth: int) -> str:
    settings = TreeSettings(depth=depth)
    channels = num_channels(settings.levels, settings.top_k)
    finder = BackendFinder(torch.bfloat16, "auto", {}, given=backend)
    head = choose_padded_head(finder, head_size, head_size + channels)
    return "refused" if head is None else str(head.size)


def head_size_table() -> str:
    """Rows of backends, columns of head sizes; a cell has one number for each depth."""
    titles = " | ".join(f"heads of {size}" for size in HEAD_SIZES)
    rows = [f"| backend | {titles} | state |", "|---" * (len(HEAD_SIZES) + 2) + "|"]
    for name, (module, cls, state) in BACKENDS.items():
        backend = getattr(import_module(f"vllm.v1.attention.backends.{module}"), cls)
        cells = [
            ", ".join(_padded(backend, size, depth) for depth in DEPTHS) for size in HEAD_SIZES
        ]
        rows.append(f"| `{name}` | {' | '.join(cells)} | {state} |")
    return "\n".join(rows) + "\n"


def test_head_sizes_are_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = SECTION.search(text)
    assert found is not None
    if os.environ.get("VISPEC_WRITE_README"):
        PAGE.write_text(SECTION.sub(lambda m: m[1] + head_size_table() + m[2], text), "utf-8")
        return
    assert found[0] == found[1] + head_size_table() + found[2]


def test_backends_store_keys_apart() -> None:
    """Padded keys are stored by the backend's own operator, which all of these have."""
    for module, cls, _ in BACKENDS.values():
        backend = getattr(import_module(f"vllm.v1.attention.backends.{module}"), cls)
        assert not backend.forward_includes_kv_cache_update, cls
