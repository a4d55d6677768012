"""Padding of observed samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.train.samples import all_samples, random_sample
from vllm_vispec.train.batch import pad_batch
from vllm_vispec.utils.errors import ViSpecError


def test_padding_keeps_every_sample_and_adds_nothing_else() -> None:
    samples = all_samples()
    batch = pad_batch(samples)
    assert batch.lengths == tuple(len(sample.token_ids) for sample in samples)
    assert batch.runs == tuple(sample.runs for sample in samples)
    for b, sample in enumerate(samples):
        n = batch.lengths[b]
        assert torch.equal(batch.ids_BL[b, :n], sample.token_ids)
        assert torch.equal(batch.answer_BL[b, :n], sample.answer)
        assert torch.equal(batch.embeds_BLD[b, :n], sample.embeds_LD)
        assert torch.equal(batch.hidden_BLD[b, :n], sample.hidden_LD)
        assert not batch.answer_BL[b, n:].any()
        assert not batch.hidden_BLD[b, n:].any()


def test_moving_a_batch_changes_only_the_dtype_of_states() -> None:
    batch = pad_batch([random_sample(9)]).to("cpu", torch.bfloat16)
    assert batch.embeds_BLD.dtype == batch.hidden_BLD.dtype == torch.bfloat16
    assert batch.ids_BL.dtype == torch.int64
    assert batch.answer_BL.dtype == torch.bool


def test_tensors_of_different_lengths_are_refused() -> None:
    sample = random_sample(9)
    with pytest.raises(ViSpecError, match="different lengths"):
        replace(sample, hidden_LD=sample.hidden_LD[:-1])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ViSpecError, match="at least one"):
        pad_batch([])
