"""A draft VLM at start: what is refused before an engine is built, and what its log line says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.heads import DRAFT_VLM
from vllm_vispec.config import reads_embeddings, reads_target_states
from vllm_vispec.heads.config import ARCHITECTURE, DRAFT_VLM_ARCHITECTURE, EMBEDS_ARCHITECTURE
from vllm_vispec.spec_decode.checks import check_target
from vllm_vispec.utils.errors import ViSpecError


def _target() -> Any:
    """A target that the draft VLM was made for."""
    text = SimpleNamespace(hidden_size=DRAFT_VLM.vision_size, vocab_size=DRAFT_VLM.vocab_size)
    return SimpleNamespace(
        model="target",
        is_multimodal_model=True,
        hf_text_config=text,
        hf_config=SimpleNamespace(model_type=DRAFT_VLM.target_model_type),
        multimodal_config=None,
        is_mm_prefix_lm=False,
    )


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"vision_size": 40}, 1, "vision_size of the head is 40.*is 32: use the head"),
        ({"vocab_size": 65}, 1, "vocab_size of the head is 65.*is 64: use the head"),
        # One key/value head is repeated for every worker; attention heads are divided.
        ({}, 2, "tensor_parallel_size=2 does not fit the draft's 3 attention heads.*one of 1, 3"),
    ],
)
def test_refused(changes: dict[str, Any], size: int, message: str) -> None:
    # Its width need not be the target's, and three workers repeat its key/value head.
    assert DRAFT_VLM.hidden_size != DRAFT_VLM.vision_size
    check_target(DRAFT_VLM, _target(), SimpleNamespace(tensor_parallel_size=3))
    parallel = SimpleNamespace(tensor_parallel_size=size)
    with pytest.raises(ViSpecError, match=message):
        check_target(replace(DRAFT_VLM, **changes), _target(), parallel)


@pytest.mark.parametrize(
    ("architecture", "embeddings", "states"),
    [
        (ARCHITECTURE, False, True),
        (EMBEDS_ARCHITECTURE, True, True),
        (DRAFT_VLM_ARCHITECTURE, True, False),
    ],
)
def test_what_a_draft_reads(architecture: str, embeddings: bool, states: bool) -> None:
    draft = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    config = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft))
    assert reads_embeddings(config) == embeddings
    assert reads_target_states(config) == states
