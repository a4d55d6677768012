"""vLLM's Triton attention on padded heads: masks are exact, and nothing is written elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.models.triton_attention_jobs import kernels
from tests.support.child import Child
from tests.support.runners import V2_ENV, overlay_folder

# Against a masked softmax in float32; the kernel rounds weights to the cache's dtype.
TOLERANCE = {"float16": 2e-3, "bfloat16": 0.03, "float8_e4m3fn": 0.5}


@pytest.mark.parametrize("release", ["0.32", pytest.param("0.33", marks=pytest.mark.overlay)])
def test_padded_heads(release: str) -> None:
    """Chains and trees, heads that cross a power of two."""
    env = {} if release == "0.32" else {"PYTHONPATH": overlay_folder()}
    child = Child(V2_ENV | env, timeout=300)
    vllms, *ours = child.call(kernels, tuple(TOLERANCE))
    child.close()
    # vLLM's own scratch is too narrow, so the guard behind it is worth something.
    assert not vllms["fits"]
    assert vllms["outside"] > 0
    assert {item["head"] for item in ours} == {72, 80, 88, 136, 144, 152}
    for item in ours:
        assert item["fits"]
        assert item["outside"] == 0, item
        assert item["error"] < TOLERANCE[item["dtype"]], item
        assert item["hidden"] > 0
        assert not item["leaks"], item


def test_where_elements_lie() -> None:
    """By vLLM's own kernel, which takes only the stride of tokens from keys and values."""
    child = Child(V2_ENV)
    assert child.call(_lie_as_strides_say) == [True] * 4
    child.close()


def _lie_as_strides_say() -> list[bool]:
    """Whether a layer with several heads is found to store as its cache's strides say."""
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from vllm_vispec.trees.attention import padded_impl
    from vllm_vispec.trees.target_cache import find_elements

    heads, head_size, padded, block = 3, 16, 24, 16
    impl: Any = padded_impl(TritonAttentionImpl, padded)(
        heads, head_size, 1.0, heads, None, None, "auto"
    )
    impl.tree_padding = SimpleNamespace(key_shape=(heads, head_size, padded))
    found, one = [], torch.ones(())
    # Only which tile the kernel takes depends on it.
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        for dtype in (torch.float16, torch.bfloat16):
            by_head = torch.zeros(4, heads, block, 2 * padded, dtype=dtype)
            by_token = torch.zeros(4, block, heads, 2 * padded, dtype=dtype).transpose(1, 2)
            for cache in (by_head, by_token):
                layer = SimpleNamespace(kv_cache=cache, impl=impl, _k_scale=one, _v_scale=one)
                found.append(find_elements(layer) is None)
    return found
