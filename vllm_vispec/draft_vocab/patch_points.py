"""What a draft with a vocabulary of its own relies on in vLLM."""

from dataclasses import replace
from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, overrides, reads
from vllm_vispec.config import ViSpecConfig


def has_draft_vocab(vllm_config: Any) -> bool:
    """Whether the draft proposes some of the target's tokens only."""
    return ViSpecConfig.from_vllm(vllm_config).draft_vocab is not None


DRAFT_VOCAB = PatchGroup(
    name="draft_vocab",
    feature="draft_vocab",
    remedy='leave "draft_vocab" out of the speculative config',
    is_needed=has_draft_vocab,
    points=(
        overrides(
            "vllm.model_executor.layers.logits_processor:LogitsProcessor.self.org_vocab_size",
            "number of the draft's tokens",
        ),
    ),
)

V2_DRAFT_VOCAB = replace(
    DRAFT_VOCAB,
    runner="v2",
    points=(
        reads(
            "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.sample_draft"
            "(hidden_states, draft_logits)",
            "asks the draft for tokens if use_local_argmax_reduction is set",
        ),
    ),
)

GROUPS = (DRAFT_VOCAB, V2_DRAFT_VOCAB)
