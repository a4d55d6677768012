"""What the gate of compressors relies on in vLLM: ends of prompts."""

from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, wraps
from vllm_vispec.config import head_of


def has_gate(vllm_config: Any) -> bool:
    """Whether the head chooses among several compressors for each request."""
    head = head_of(vllm_config)
    return head.has_compressor and head.compressor_spec.gated


GATE = PatchGroup(
    name="gate",
    feature="compressors with a gate",
    remedy="use a head without a gate",
    runner="v2",
    is_needed=has_gate,
    points=(
        wraps(
            "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request"
            "(req_index, new_req_data)",
            "where a prompt ends (one object only)",
        ),
    ),
)

GROUPS = (GATE,)
