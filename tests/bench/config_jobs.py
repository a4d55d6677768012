"""Child-process job: what vLLM makes of a speculative config, without starting an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.engine import register_plugin


def resolve(
    target: str, config: Mapping[str, Any], sizes: list[int], max_num_seqs: int
) -> dict[str, Any]:
    """Return vLLM's version and the K that its scheduler takes at each batch size."""
    register_plugin()
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    arguments = EngineArgs(model=target, dtype="float32", max_num_seqs=max_num_seqs)
    arguments.speculative_config = dict(config)
    found = arguments.create_engine_config().speculative_config
    assert found is not None
    lookup = build_dynamic_sd_schedule_lookup(
        found.num_speculative_tokens_per_batch_size,
        vllm_max_batch_size=max_num_seqs,
        vllm_num_speculative_tokens=found.num_speculative_tokens,
    )
    return {"version": vllm.__version__, "k": [lookup[size] for size in sizes]}
