"""vLLM's CPU matrices are released without a sound while a model is traced."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import _disable_current_modes

from vllm_vispec.v1.cpu_repairs import release_gemm


def test_release_while_a_model_is_traced() -> None:
    from vllm import _custom_ops as ops

    if not ops._supports_onednn:
        pytest.skip("a build without oneDNN")
    original = inspect.unwrap(ops.CPUDNNLGEMMHandler.__del__)
    with FakeTensorMode() as mode:
        for inside in (nullcontext(), in_kernel_invocation_manager(mode)):
            with _disable_current_modes():
                handler = ops.create_onednn_mm(torch.randn(32, 32).t(), 8)
            with inside, enable_python_dispatcher():
                with pytest.raises((AssertionError, RecursionError)):
                    original(handler)
                release_gemm(original, handler)
            handler.handler_tensor = None  # Released; collecting it must not do it again.
