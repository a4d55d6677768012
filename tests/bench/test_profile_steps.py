"""Steps of an engine split into parts, without an engine, and figures over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.made_up_spans import DECODE, OURS, K, Tape, prefill
from vllm_vispec.bench import profile_steps as parts
from vllm_vispec.bench.profile_engine import install
from vllm_vispec.bench.profile_result import summarise
from vllm_vispec.bench.profile_steps import (
    INCOMPLETE,
    OTHER_BATCH,
    Batch,
    Block,
    Recorder,
)
from vllm_vispec.utils.errors import ViSpecError


def test_a_decoding_step() -> None:
    tape = Tape()
    tape.step(DECODE, ours=OURS[:1])
    (found,) = tape.found().steps
    assert (found.kind, found.requests, found.prompt_tokens) == ("decode", 1, 0)
    assert found.seconds == {
        "vision_tower": 0,
        "target_pass": 50,
        "target_lm_head": 7,
        "verification": 4,
        "adaptor": 0,
        "row_ids": 3,
        "draft_embedding": 0,
        "draft_first_pass": 20,
        "draft_step_1": 11,
        "draft_step_2": 12,
        "draft_lm_head": 36,
        "draft_sampling": 3,
        "draft_host": 6,
        "host": 3,
    }
    assert sum(found.seconds.values()) == found.wholes["step"] == 155
    assert found.wholes["first_pass"] == 6 + 3 + 20 + 1 + 12
    assert found.wholes["draft_step"] == ((11 + 13) + (12 + 13)) / 2
    assert found.wholes["propose"] == 91


def test_a_pass_that_drafts_nothing_is_part_of_the_first() -> None:
    tape = Tape()
    tape.step(DECODE, fills=(30.0,))
    (found,) = tape.found().steps
    assert found.seconds["draft_first_pass"] == 30 + 20
    assert (found.seconds["draft_step_1"], found.seconds["draft_step_2"]) == (11, 12)
    assert found.wholes["first_pass"] == 6 + 30 + 20 + 1 + 12
    tape.step(DECODE, fills=(30.0, 30.0))
    assert tape.found().left_out == {INCOMPLETE: 1}


def test_a_prefill_is_apart() -> None:
    tape = Tape()
    tape.step(prefill(40, 30), vision=25.0, ours=OURS)
    tape.step(DECODE)
    first, second = tape.found().steps
    assert first.shape == ("prefill", 1, 40, 30)
    assert (first.seconds["vision_tower"], first.seconds["adaptor"]) == (25, 5)
    assert sum(first.seconds.values()) == pytest.approx(first.wholes["step"])
    assert second.kind == "decode"
    assert list(first.seconds) == list(second.seconds) == list(parts.columns(K))


@pytest.mark.parametrize(
    ("batch", "drafts", "reason"),
    [
        (Batch((2,), (1,)), K, OTHER_BATCH),  # fewer draft tokens than K
        (Batch((K + 1,), (0,)), K, OTHER_BATCH),  # a piece of a prompt that happens to be as long
        (Batch((K + 1, K + 1), (K, K)), K, OTHER_BATCH),  # more requests than are asked together
        (Batch((20,), (0,), (40,)), K, OTHER_BATCH),  # the beginning of a prompt
        (prefill(40, computed=8), K, OTHER_BATCH),  # its end
        (Batch((K + 1, 40), (K, 0), (40,)), K, OTHER_BATCH),  # decoding and a prompt
        (DECODE, K - 1, INCOMPLETE),
        (DECODE, K + 1, INCOMPLETE),
        (DECODE, 0, INCOMPLETE),
    ],
)
def test_other_steps_are_left_out(batch: Batch, drafts: int, reason: str) -> None:
    tape = Tape()
    tape.step(DECODE)
    tape.step(batch, drafts=drafts)
    found = tape.found()
    assert len(found.steps) == 1
    assert found.left_out == {reason: 1}


def test_one_draft_token_has_no_step() -> None:
    tape = Tape()
    tape.step(Batch((2,), (1,)), drafts=1)
    (found,) = tape.found(drafts=1).steps
    assert not [name for name in found.seconds if name.startswith(parts.DRAFT_STEP)]
    assert "draft_step" not in found.wholes
    assert sum(found.seconds.values()) == found.wholes["step"]


class Draft(torch.nn.Module):
    """A module with the methods of a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_top_tokens(x)

    def get_top_tokens(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_objects_are_watched_and_their_classes_are_not() -> None:
    ticks = iter(range(100))
    recorder = Recorder(lambda: float(next(ticks)))
    watched, other = Draft(), Draft()
    recorder.wrap(watched, "forward", "model")
    recorder.wrap(watched, "compute_logits", "logits")
    recorder.wrap(watched, "get_top_tokens", "logits")
    one = torch.ones(1)
    for module in (watched, other):
        assert module(one).item() == 2
        assert module.compute_logits(one).item() == 1
    # A call inside of a span with the same name is no span of its own.
    assert [(span.name, span.seconds) for span in recorder.take()] == [("model", 1), ("logits", 1)]
    assert recorder.take() == []


def test_wrong_engines_are_refused() -> None:
    worker = SimpleNamespace(model_runner=SimpleNamespace(drafter=1))
    one, two = (SimpleNamespace(collective_rpc=lambda _, n=n: [worker] * n) for n in (1, 2))
    with pytest.raises(ViSpecError, match="--runner v2: vLLM started another model runner"):
        install(Recorder(lambda: 0.0), one, "v2")
    with pytest.raises(ViSpecError, match="more than one process; a profile needs one"):
        install(Recorder(lambda: 0.0), two, "v1")


def block(eagle: float, vispec: float, rounds: int = 3) -> Block:
    """A block whose first passes take that long."""
    sides = []
    for seconds in (eagle, vispec):
        tape = Tape()
        for _ in range(rounds):
            tape.step(DECODE, first_pass=seconds)
        sides.append(tape.found().steps)
    return list(zip(*sides, strict=True))


def first_pass(blocks: list[Block]) -> dict[str, Any]:
    """The draft's first pass in a summary of blocks."""
    found: dict[str, Any] = summarise(blocks)["parts"]["draft_first_pass"]
    return found


def test_ratio_of_medians_with_interval() -> None:
    found = summarise([block(20, 10), block(22, 11), block(40, 20)])
    assert found["steps"] == 9
    assert found["parts"]["target_pass"]["ratio_low"] == 1.0
    assert found["parts"]["row_ids"]["ratio"] is None
    one = found["parts"]["draft_first_pass"]
    assert (one["eagle"]["median"], one["vispec"]["median"], one["ratio"]) == (22, 11, 0.5)
    assert (one["ratio_low"], one["ratio_high"], one["ratio_first_decile"]) == (0.5, 0.5, 0.5)


def test_interval_is_as_wide_as_blocks_differ() -> None:
    blocks = [block(20, 20 * factor) for factor in (0.8, 0.9, 1.0, 1.1, 1.2)]
    found = first_pass(blocks)
    assert 0.8 <= found["ratio_low"] < 1.0 < found["ratio_high"] <= 1.2
    assert first_pass(blocks) == found
    alone = first_pass(blocks[:1])
    assert (alone["ratio"], alone["ratio_low"], alone["ratio_high"]) == (0.8, None, None)


def test_typical_parts_add_up_to_a_step() -> None:
    blocks = [block(eagle, 10) for eagle in (20, 21, 22, 23, 24, 25, 26, 27, 28, 2000)]
    parts = summarise(blocks)["parts"].values()
    typical = sum(part["eagle"]["typical"] for part in parts)
    assert typical == pytest.approx(152 - 20 + 24.5, abs=1)
