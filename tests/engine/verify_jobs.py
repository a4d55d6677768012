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
