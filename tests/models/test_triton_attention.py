"""How vLLM's Triton backend stores padded heads; how it attends is tried by `tests.gpu.bare`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.support.child import Child
from tests.support.runners import V2_ENV


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
