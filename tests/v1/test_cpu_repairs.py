"""vLLM's CPU matrices are released without a sound while a model is traced."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_vispec.v1.cpu_repairs import release_gemm


def test_release_under_fake_tensors() -> None:
    from vllm import _custom_ops as ops

    if not ops._supports_onednn:
        pytest.skip("a build without oneDNN")
    handler = ops.create_onednn_mm(torch.randn(32, 32).t(), 8)
    original = inspect.unwrap(ops.CPUDNNLGEMMHandler.__del__)
    with FakeTensorMode():
        with pytest.raises(AssertionError, match="FakeTensor"):
            original(handler)
        release_gemm(original, handler)
    handler.handler_tensor = None  # Released; collecting the handler must not do it again.
