"""Child-process jobs: the attention check of `vispec verify`, whole and with something left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

from vllm_vispec.verify.result import CHAIN, TREE, AttentionCase

CASES = (AttentionCase(CHAIN, 64, 72, 4, 2, 1), AttentionCase(TREE, 128, 152, 4, 2, 30))


def attention_errors(target: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Yield each case's errors: as it is, without keys' channels, and with NaN in the values."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.verify import attention

    config = EngineArgs(model=target, dtype=dtype, max_model_len=1024).create_engine_config()
    make = attention.Batch.make

    def without_channels(case: AttentionCase, *args: Any) -> Any:
        batch = make(case, *args)
        batch.key[..., case.head_size :] = 0
        return batch

    def with_nan(case: AttentionCase, *args: Any) -> Any:
        batch = make(case, *args)
        batch.value[0] = float("nan")
        return batch

    for case in CASES:
        found = {"as it is": attention.check_attention(config, case, "CPU_ATTN")}
        for name, changed in (("no channels", without_channels), ("NaN", with_nan)):
            with mock.patch.object(attention.Batch, "make", changed):
                found[name] = attention.check_attention(config, case, "CPU_ATTN")
        yield {name: one.to_json() for name, one in found.items()}


def cuda_attention(target: str) -> Iterator[dict[str, Any]]:
    """Yield what comes of CUDA's backends with stand-ins; only Triton's kernels run."""
    from tests.support import cuda_stand_in

    platform = cuda_stand_in.install()
    platform.device_type = "cpu"
    # vLLM's custom operators of attention exist for CUDA alone.
    platform.opaque_attention_op = classmethod(lambda cls: False)
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_vispec.verify import attention
    from vllm_vispec.verify.run import BACKENDS

    config = EngineArgs(
        model=target, dtype="float32", max_model_len=256, max_num_seqs=32
    ).create_engine_config()
    with (
        mock.patch.object(attention, "PROMPTS", (17, 33, 50)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        for case in CASES:
            found = attention.check_attention(config, case, "TRITON_ATTN")
            yield {"case": case.feature, "size": found.used_size, "error": found.worst}
    config.model_config.dtype = torch.bfloat16
    for backend in BACKENDS["cuda"]:
        backend_class = AttentionBackendEnum[backend].get_class()
        for case in CASES:
            with set_current_vllm_config(config):
                size, _ = attention._find_head_size(config, backend_class, case)
            assert size is not None
            cpu = torch.device("cpu")
            layer = attention.PagedLayer.build(config, backend_class, case, size, cpu)
            builder = type(layer.group.get_metadata_builder(0)).__name__
            yield {"backend": backend, "case": case.feature, "size": size, "builder": builder}
