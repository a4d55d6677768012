"""Backend and head size of padded heads on NVIDIA GPUs, as vLLM's own Python code decides.

The process has stand-ins for what is compiled for CUDA; nothing runs on a device.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.child import run_in_subprocess
from tests.support.runners import overlay_folder

# What heads of 64, 80, 96 and 128 become: the draft's with a chain, the target's with a tree.
EXPECTED = """
chain auto 8.0  | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain auto 8.9  | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain auto 9.0  | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain auto 10.0 | FLASHINFER 128 | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASHINFER 256
chain auto 12.0 | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain fp8 8.0   | FLASHINFER 128 | FLASHINFER 128 | FLASHINFER 128  | FLASHINFER 256
chain fp8 8.9   | FLASHINFER 128 | TRITON_ATTN 96 | TRITON_ATTN 112 | FLASHINFER 256
chain fp8 9.0   | FLASH_ATTN 80  | FLASH_ATTN 96  | FLASH_ATTN 112  | FLASH_ATTN 144
chain fp8 10.0  | FLASHINFER 128 | FLASH_ATTN 96  | FLASH_ATTN 112  | FLASHINFER 256
chain fp8 12.0  | FLASHINFER 128 | TRITON_ATTN 96 | TRITON_ATTN 112 | FLASHINFER 256
tree auto 8.0   | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree auto 8.9   | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree auto 9.0   | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree auto 10.0  | FLASHINFER 128 | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASHINFER 256
tree auto 12.0  | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree fp8 8.0    | refused        | refused        | refused         | refused
tree fp8 8.9    | refused        | refused        | refused         | refused
tree fp8 9.0    | refused        | refused        | refused         | refused
tree fp8 10.0   | refused        | refused        | refused         | refused
tree fp8 12.0   | refused        | refused        | refused         | refused
"""
# Backend, head size of layer, spec and builder, split-K scratch, and whether FlashInfer's layer
# takes a workspace made for 128 channels, and one made for its own.
LAYERS = [
    ("FLASH_ATTN", 136, 136, None, None),
    ("FLASH_ATTN", 144, 144, None, None),
    ("TRITON_ATTN", 136, 136, [64, 4, 16, 256], None),
    ("TRITON_ATTN", 144, 144, [64, 4, 16, 256], None),
    ("TRITON_ATTN", 136, 136, [16, 4, 64, 256], None),
    ("FLASHINFER", 256, 256, None, [False, True]),
    ("FLASHINFER", 256, 256, None, [False, True]),
    # The builder keeps the target's head size and never reads it.
    ("FLEX_ATTENTION", 136, 128, None, None),
]
REFUSALS = [
    ('heads of 260 channels with kv_cache_dtype=auto; .*"TRITON_ATTN" in the speculative config'),
    ('heads of 131 channels with kv_cache_dtype=fp8; .*"FLASHINFER" in the speculative config'),
    ('heads of 131 channels with kv_cache_dtype=fp8; .*"FLASHINFER" in the speculative config'),
    ('with kv_cache_dtype=int8_per_token_head; .*set "attention_backend": "TRITON_ATTN" in the'),
    ("heads of 518 channels with kv_cache_dtype=fp8; .*image rows; leave kv_cache_dtype out"),
]

# What a layer asks the selector for beyond a plain one: with a sliding window, sinks, a quantized
# cache by the checkpoint's own word, per head, and in a model whose images see themselves whole.
QUESTIONS = [
    ["auto", {}, "FLASH_ATTN 136"],
    ["auto", {"has_sliding_window": True}, "FLASH_ATTN 136"],
    ["auto", {"has_sink": True}, "FLASH_ATTN 136"],
    ["fp8", {}, "FLASH_ATTN 144"],
    ["fp8", {"use_per_head_quant_scales": True}, "FLASH_ATTN 144"],
    ["auto", {"use_mm_prefix": True}, "TRITON_ATTN 136"],
]
# While the configuration is built nothing imports FlashInfer: then nothing is known, or no other
# backend is stated.
STARTS = [
    "^no objection$",
    "^no objection$",
    'heads of 131 channels with kv_cache_dtype=fp8; .*set "attention_backend": "FLASHINFER"',
    'heads of 131 channels with kv_cache_dtype=fp8; .*set "attention_backend": "FLASHINFER"',
    "^no objection$",
]


def check(env: dict[str, str]) -> None:
    """Compare all that the process with stand-ins says."""
    said = run_in_subprocess("tests.models.cuda_backend_jobs:everything", env=env, timeout=300)
    kinds = ("heads", "refusal", "layer", "question", "start")
    heads, refused, layers, questions, starts = (
        [item[kind] for item in said if kind in item] for kind in kinds
    )
    expected = [
        [*words.split(), *(cell.strip() for cell in cells)]
        for words, *cells in (line.split("|") for line in EXPECTED.strip().splitlines())
    ]
    assert heads == expected
    assert [_sizes(layer) for layer in layers] == LAYERS
    assert [item["flex"] for item in said if "flex" in item] == [1]
    assert questions == QUESTIONS
    for line, pattern in zip([*refused, *starts], [*REFUSALS, *STARTS], strict=True):
        assert "\n" not in line
        assert re.search(pattern, line), line


def _sizes(layer: dict[str, Any]) -> tuple[Any, ...]:
    padded = layer["padded_size"]
    assert [layer["impl"], *layer["spec"]] == [padded] * 3
    return layer["backend"], padded, layer["builder"], layer["scratch"], layer["shares"]


def test_backends_and_head_sizes() -> None:
    check({})


@pytest.mark.overlay
def test_backends_and_head_sizes_0_33() -> None:
    check({"PYTHONPATH": overlay_folder()})
