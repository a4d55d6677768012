"""What draft VLMs rely on in vLLM: buffers of hidden states, embedding and lm_head."""

from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, reads
from vllm_vispec.config import reads_target_states


def is_draft_vlm(vllm_config: Any) -> bool:
    """Whether the engine drafts with a vision language model of its own."""
    return not reads_target_states(vllm_config)


DRAFT_VLM = PatchGroup(
    name="draft VLM",
    feature="draft VLMs",
    remedy="use another head",
    runner="v2",
    is_needed=is_draft_vlm,
    points=(
        reads(
            "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator:update_draft_inputs"
            "(hidden_states, next_input_hidden_states)",
            "copies as many columns as the draft's second output has, here none",
        ),
        reads(
            "vllm.v1.worker.gpu.spec_decode.eagle.utils:_should_share(eagle, flag, draft, target)",
            "keeps its own embedding and lm_head",
        ),
    ),
)

GROUPS = (DRAFT_VLM,)
