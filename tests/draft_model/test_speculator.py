"""What a published model's speculator tells vLLM's: steps, columns and tokens, without a device.

Shapes: R requests, T tokens, D hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator as vllm_speculator

from vllm_vispec.draft_model.speculator import PublishedSpeculator
from vllm_vispec.trees import cudagraph
from vllm_vispec.v1.published_proposer import PublishedProposer

COUNT, HIDDEN_RD = 4, torch.zeros(2, 8)
BASE = vllm_speculator.TargetDependentARSpeculator


@pytest.fixture
def speculator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a speculator of 4 draft tokens whose calls of vLLM's methods are recorded."""
    found = object.__new__(PublishedSpeculator)
    found.num_speculative_steps = COUNT + 1
    found.draft_rows = Mock()
    found.last_token_indices = torch.tensor([1, 3, 0])
    found.input_buffers = SimpleNamespace(input_ids=torch.tensor([11, 12, 21, 22, 0]))
    found._next_tokens = torch.zeros(3, dtype=torch.int64)
    found._is_first_pass, found._batch = False, None
    for name in ("_generate_draft", "sample_draft", "_prefill"):
        monkeypatch.setattr(BASE, name, Mock())
    return found


def _batch() -> Any:
    return SimpleNamespace(input_ids=torch.tensor([10, 11, 20, 21, 7]), num_tokens=4)


def test_every_step_but_the_last_prepares_the_next(speculator: Any) -> None:
    speculator._generate_draft(*"abcdef", 2)
    speculator._generate_draft(*"abcd", num_tokens_across_dp="e", num_speculative_steps=2)
    by_place, by_name = BASE._generate_draft.call_args_list
    assert by_place.args == tuple("abcdef")
    assert by_place.kwargs == {"num_speculative_steps": COUNT + 1}
    assert by_name.kwargs == {"num_tokens_across_dp": "e", "num_speculative_steps": COUNT + 1}


def test_the_first_pass_has_the_targets_rows_and_samples_nothing(speculator: Any) -> None:
    speculator._batch = _batch()
    speculator.on_prefill_begin(2)
    assert speculator.input_buffers.input_ids.tolist() == [10, 11, 20, 21, 0]
    assert speculator.sample_draft(HIDDEN_RD, *"abcde").tolist() == [12, 22]
    assert not BASE.sample_draft.called
    speculator.on_prefill_end(2)
    place, step = torch.tensor([5, 6]), torch.tensor(1)
    speculator.sample_draft(HIDDEN_RD, place, "map", "temperature", "seeds", step, "logits")
    _, found, *_, column, logits = BASE.sample_draft.call_args.args
    assert (found.tolist(), int(column), logits) == ([4, 5], 0, "logits")


def test_the_first_pass_is_whole_and_reads_the_drafts_own_features(speculator: Any) -> None:
    speculator._prefill("any", mm_inputs="the target's", skip_sample=True)
    assert BASE._prefill.call_args.kwargs == {"mm_inputs": speculator.draft_rows.features}


@pytest.mark.parametrize("schedule", [None, [(1, 2, COUNT), (3, 4, 1), (5, 6, 0)]])
def test_first_passes_are_recorded_as_the_targets_and_steps_one_longer(
    speculator: Any, monkeypatch: pytest.MonkeyPatch, schedule: list[tuple[int, int, int]] | None
) -> None:
    seen: list[int] = []
    mode = CUDAGraphMode.NONE
    own = SimpleNamespace(
        num_speculative_tokens=COUNT, num_speculative_tokens_per_batch_size=schedule
    )
    config = SimpleNamespace(speculative_config=own)

    def init(self: Any, _: CUDAGraphMode) -> None:
        seen.append(self.num_speculative_steps)
        self.decode_cudagraph_manager = SimpleNamespace(
            vllm_config=config, device="cpu", cudagraph_mode=mode, decode_query_len=1
        )

    monkeypatch.setattr(BASE, "init_cudagraph_manager", init)
    monkeypatch.setattr(
        cudagraph,
        "SpeculatorCudaGraphManager",
        lambda config, *_: SimpleNamespace(vllm_config=config),
    )
    speculator.speculative_config = own
    speculator.init_cudagraph_manager(mode)
    assert (seen, speculator.num_speculative_steps) == ([COUNT], COUNT + 1)
    steps = speculator.decode_cudagraph_manager.vllm_config.speculative_config
    longer = schedule and [(1, 2, COUNT + 1), (3, 4, 2), (5, 6, 0)]
    assert steps.num_speculative_tokens_per_batch_size == longer
    # The engine's own stays.
    assert (steps.num_speculative_tokens, own.num_speculative_tokens) == (COUNT + 1, COUNT)


@pytest.mark.parametrize("all_greedy", [False, True])
def test_the_first_pass_needs_no_lm_head_on_v1(
    monkeypatch: pytest.MonkeyPatch, all_greedy: bool
) -> None:
    """Whatever it returns is as large as what steps return, if those return probabilities."""
    sample = Mock()
    monkeypatch.setattr(SpecDecodeBaseProposer, "_sample_draft_tokens", sample)
    found = object.__new__(PublishedProposer)
    found.model = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    found._enable_probabilistic_draft_probs = True
    found._next_tokens = torch.tensor([12, 22])
    sampling = SimpleNamespace(all_greedy=all_greedy)
    tokens, probs = found._sample_draft_tokens(HIDDEN_RD, sampling)
    assert not sample.called
    assert tokens.tolist() == [12, 22]
    assert (probs is None) == all_greedy
    assert probs is None or (probs.shape, probs.dtype) == ((2, 7), torch.float32)
    found._sample_draft_tokens(HIDDEN_RD, sampling)
    assert sample.called


def test_idle_ranks_run_as_many_passes_on_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def run(self: Any, num_tokens: int) -> None:
        seen.append(self.num_speculative_tokens)

    monkeypatch.setattr(SpecDecodeBaseProposer, "dummy_run", run)
    found = object.__new__(PublishedProposer)
    found.num_speculative_tokens = COUNT
    found.dummy_run(1)
    assert (seen, found.num_speculative_tokens) == ([COUNT + 1], COUNT)
