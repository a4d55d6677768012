"""What a gate on attention to the image costs, on made-up rounds."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks.visual_gate.__main__ import examine, measured_round_cost, other_half
from benchmarks.visual_gate.gate import (
    SHARES,
    Counts,
    Gate,
    accepted_in_all,
    at_top,
    cheapest,
    count,
    gate_json,
    gates_at,
    oracle,
    rounds_of,
    scored_rounds,
    spearman,
    spearman_interval,
)
from benchmarks.visual_gate.watch import Turn, accepted_from
from vllm_vispec.errors import ViSpecError

LAYER = 5
# Ungated rounds begin at 0, 3 and 4; r is high where the round at 3 accepts nothing.
ACCEPTED = (2, 1, 0, 0, 3, 2, 1, 0)
ROW_R = np.array([0.1, 0.1, 0.1, 0.9, 0.2, 0.1, 0.1, 0.1, 0.7])
TURN = Turn("charts", ACCEPTED, {LAYER: ROW_R})


def test_rank_correlation_of_known_orders() -> None:
    assert spearman(np.array([[1, 2, 3, 4], [10, 20, 30, 99]])) == pytest.approx(1)
    assert spearman(np.array([[1, 2, 3, 4], [9, 8, 7, -1]])) == pytest.approx(-1)
    # Ranks 0 1 2 3 and 0 2 1 3: 1 - 6 * 2 / (4 * 15).
    assert spearman(np.array([[1, 2, 3, 4], [1, 3, 2, 4]])) == pytest.approx(0.8)
    # Ties at their mean: ranks 0.5 0.5 2 and 0 1 2.
    assert spearman(np.array([[1, 1, 5], [1, 2, 3]])) == pytest.approx(3**0.5 / 2)
    assert spearman(np.array([[1, 1, 1], [1, 2, 3]])) == 0


def test_intervals_of_correlations_are_over_samples() -> None:
    # Ranks of all rounds, shares of samples: one sample alone has its own sign.
    up, down = np.array([[1.0, 2, 3], [1, 2, 3]]), np.array([[4.0, 5, 6], [6, 5, 4]])
    low, high = spearman_interval([up, down] * 5)
    assert low < spearman(np.concatenate([up, down] * 5, axis=1)) < high
    assert spearman_interval([up, up]) == pytest.approx((1, 1))


def test_rows_are_the_one_before_the_known_token_and_its_own() -> None:
    assert TURN.scores(LAYER, "accepted")[3] == 0.9
    assert TURN.scores(LAYER, "pending")[2] == 0.9
    assert len(TURN.scores(LAYER, "pending")) == len(ACCEPTED)


def test_a_closed_round_makes_one_token() -> None:
    assert rounds_of(ACCEPTED) == [0, 3, 4]
    closed = [place == 0 for place in range(8)]
    # The plain pass leads to place 1, which accepts 1.
    assert rounds_of(ACCEPTED, closed) == [0, 1, 3, 4]
    assert count([TURN], lambda turn: closed) == Counts(open=3, closed=1, tokens=8)
    assert count([TURN], lambda turn: [True] * 8) == Counts(open=0, closed=8, tokens=8)
    assert accepted_in_all([[TURN]]) == 5


def test_costs_and_break_even_of_gates() -> None:
    ungated = count([TURN])
    assert ungated == Counts(3, 0, 8)
    useful = count([TURN], Gate(LAYER, "accepted", 0.5).closed)
    assert useful == Counts(2, 1, 8)
    assert ungated.cost_per_token(2.0) == pytest.approx(6 / 8)
    assert useful.cost_per_token(2.0) == pytest.approx(5 / 8)
    # One drafting round saved for one plain pass: better as soon as drafting costs anything.
    assert useful.break_even(ungated) == 1
    shut = count([TURN], lambda turn: [True] * 8)
    assert shut.break_even(ungated) == pytest.approx(8 / 3)
    assert shut.cost_per_token(8 / 3) == pytest.approx(ungated.cost_per_token(8 / 3))
    assert Counts(3, 1, 8).break_even(ungated) is None
    found = gate_json(Gate(LAYER, "accepted", 0.5), useful, ungated, 2.0)
    assert (found["rounds_closed"], found["cost_over_no_gate"]) == pytest.approx((1 / 3, 5 / 6))


@pytest.mark.parametrize("cost", [1.0, 1.5, 2.5, 4.0])
def test_the_oracle_is_no_dearer_than_any_other_gate(cost: float) -> None:
    def paid(closed: list[bool]) -> float:
        return count([TURN], lambda turn: closed).cost_per_token(cost)

    choices = product((False, True), repeat=len(ACCEPTED))
    assert paid(oracle(TURN, cost)) == pytest.approx(min(paid(list(one)) for one in choices))


def test_the_cheapest_gate_depends_on_the_cost_of_a_round() -> None:
    counts = {"none": Counts(3, 0, 8), "half": Counts(2, 2, 8), "all": Counts(0, 8, 8)}
    assert [cheapest(counts, cost) for cost in (1.5, 2.5, 4.0)] == ["none", "half", "all"]


def test_rounds_at_the_end_of_an_answer_do_not_count_for_correlations() -> None:
    scored = scored_rounds([TURN], LAYER, "accepted", 5)
    assert scored.tolist() == [[0.1, 0.9], [2.0, 0.0]]
    assert scored_rounds([TURN], LAYER, "accepted", 9).shape == (2, 0)


def test_means_at_the_top() -> None:
    scored = np.array([[0.1, 0.9, 0.8, 0.2, 0.3], [5.0, 0.0, 1.0, 4.0, 6.0]])
    assert at_top(scored, 0.4) == pytest.approx({"share": 0.4, "top": 0.5, "rest": 5.0})


def test_quantile_gates_close_their_share_of_the_ungated_rounds() -> None:
    rising = Turn("charts", (0,) * 100, {LAYER: np.arange(101) / 100})
    for gate in gates_at([[rising]], LAYER, "accepted"):
        share = sum(gate.closed(rising)) / 100
        wanted = 0.99 - gate.threshold if gate.high else gate.threshold / 0.99
        assert share == pytest.approx(wanted, abs=0.011)


def test_a_gate_is_judged_on_the_half_that_did_not_choose_it() -> None:
    # Each of two gates helps one half and ruins the other: chosen there, paid here.
    good, bad, plain = Counts(1, 1, 8), Counts(6, 2, 8), [[TURN], [TURN]]
    first, second = Gate(0, "accepted", 0.1), Gate(1, "accepted", 0.1)
    table = {first: [good, bad], second: [bad, good]}
    assert other_half(plain, table, 2.0) == {"cost_over_no_gate": pytest.approx(14 / 6)}


def test_a_head_whose_losses_follow_the_image() -> None:
    generator = np.random.default_rng(0)
    samples = [[_turn_that_follows(generator)] for _ in range(12)]
    found = examine(samples, None, 3, 2.0)
    (told, late) = found["layers"]
    assert told["spearman"] < -0.8
    assert told["spearman_interval_95"][0] <= told["spearman"] <= told["spearman_interval_95"][1]
    top = told["accepted_draft_at_top"][0]
    assert top["top"] < 1 < top["rest"]
    assert told["best_gate"]["cost_over_no_gate"] < 1
    assert found["best_gate_chosen_on_other_half"]["cost_over_no_gate"] < 1
    assert found["oracle"]["cost_over_no_gate"] <= told["best_gate"]["cost_over_no_gate"]
    # The last layer's gates and ViSkip's own.
    assert len(found["gates_of_last_layer"]) == 2 * len(SHARES) + 1
    assert (told["row"], late["row"]) == ("accepted", "pending")
    with pytest.raises(ViSpecError, match="--layer"):
        examine(samples, [LAYER + 1], 3, 2.0)


def test_accepted_from_every_place_of_an_answer() -> None:
    # Pass s at row p drafts token p + 2 of the chain that began at row p - s.
    hits = [[False, True, True, False, True, True], [False, False, True, False, True, True]]
    # From token 2: right at rows 1 and 2. From 3: right at row 2, wrong at 3. From 4: wrong at 3.
    assert accepted_from(hits, 2, 6) == (2, 1, 0)


def test_round_cost_of_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    row = {"num_speculative_tokens": 7, "tokens_per_round": 6.0, "decode_speedup": 4.0}
    file.write_text(json.dumps({"results": [row]}))
    assert measured_round_cost(file, 7) == 1.5
    with pytest.raises(ViSpecError, match="--round-cost"):
        measured_round_cost(file, 3)


def _turn_that_follows(generator: np.random.Generator) -> Turn:
    accepted = generator.choice(4, size=40, p=(0.3, 0.1, 0.2, 0.4))
    visual = np.append(1 - accepted / 4 + generator.uniform(0, 0.01, 40), 0.0)
    return Turn("charts", tuple(accepted.tolist()), {LAYER: visual})
