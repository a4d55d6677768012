"""Two faults of vLLM 0.32 and 0.33 on CPUs that drafting with the V1 model runner meets.

Goes with the V1 model runner: vLLM calls that one deprecated, and GPUs are not affected. Once the
oldest vLLM we support has no V1 runner, this folder is deleted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

# Which of PyTorch's dispatch keys this thread includes and excludes while nothing is traced.
_UNTRACED = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def expand_batch_to_tokens(
    _original: Any,
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Stands for vLLM's function of this name: repeats each request's value for its tokens.

    vLLM's kernel for CPUs writes into an int64 copy of its output and drops it. So with any
    speculative method and any request above temperature zero, the whole batch would be sampled with
    uninitialised temperatures.

    Args:
        x: ``[R]``, one value per request.
        cu_num_tokens: ``[R]``, tokens up to and including each request.
        num_tokens: Length of the result.
        replace_from: Value that is replaced.
        replace_to: What it is replaced by.

    Returns:
        ``[num_tokens]`` of ``x``'s dtype.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def release_gemm(original: Callable[[Any], None], handler: Any) -> None:
    """Stands for ``CPUDNNLGEMMHandler.__del__``: as that, outside of any tracing.

    A handler of oneDNN reads a tensor when it is collected. If torch.compile traces a model at that
    moment, the tensor meets fake ones, or the meta kernels that fake ones are computed with: the
    handler's memory is lost, and a traceback of dozens of lines is printed for every linear layer
    of a model that was dropped.
    """
    with _disable_current_modes(), torch._C._ForceDispatchKeyGuard(*_UNTRACED):
        original(handler)
