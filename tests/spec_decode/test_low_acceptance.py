"""The log says it when a head is hardly ever right."""

from __future__ import annotations

import logging

import pytest
from vllm.v1.metrics import loggers
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_vispec.spec_decode import low_acceptance


def log(num_drafts: int, accepted: int) -> None:
    """Log some steps of 5 draft tokens as a server does."""
    logging_of_engine = SpecDecodingLogging()
    stats = SpecDecodingStats.new(5)
    stats.num_drafts, stats.num_draft_tokens = num_drafts, 5 * num_drafts
    stats.num_accepted_tokens = stats.num_accepted_tokens_per_pos[0] = accepted
    logging_of_engine.observe(stats)
    logging_of_engine.log(log_fn=loggers.logger.info)


def test_a_low_acceptance_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        low_acceptance.logger, "warning", lambda text, *args: told.append(text % args)
    )
    monkeypatch.setattr(loggers.logger, "disabled", False)
    loggers.logger.setLevel(logging.INFO)
    low_acceptance.watch_acceptance("qwen2_5_vl")
    log(num_drafts=10, accepted=0)  # too few to say anything
    assert told == []
    log(num_drafts=100, accepted=5)
    log(num_drafts=100, accepted=5)
    (line,) = told
    assert "acceptance length 1.05 is so low" in line
    assert "serve without it" in line
    # Each engine anew; a head that is right now and then is not named.
    low_acceptance.watch_acceptance("qwen2_5_vl")
    log(num_drafts=100, accepted=30)
    log(num_drafts=100, accepted=0)
    assert len(told) == 1
    # Of a family that nobody tested, fewer draft tokens are judged: are they right by chance?
    low_acceptance.watch_acceptance("ernie4_5_vl_moe")
    log(num_drafts=7, accepted=0)
    assert len(told) == 1
    log(num_drafts=7, accepted=0)
    assert "the first drafts for ernie4_5_vl_moe, a family that was not tested" in told[1]
    low_acceptance.watch_acceptance("ernie4_5_vl_moe")
    log(num_drafts=20, accepted=15)
    assert len(told) == 2
