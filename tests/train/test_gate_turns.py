"""The gate over batches: whose state it reads, which rows it rules, when it draws."""

from __future__ import annotations

import math

import pytest
import torch

from tests.train.samples import COMPRESSORS, HEADS, all_samples, random_draft, random_sample
from vllm_vispec.compressors.gate import HIDDEN_BIAS, GateOutput, balance
from vllm_vispec.compressors.spec import parse_compressor
from vllm_vispec.compressors.turns import gate_rows
from vllm_vispec.reference import decide
from vllm_vispec.train.batch import DraftBatch, pad_batch
from vllm_vispec.train.config import LossSettings
from vllm_vispec.train.metrics import GateDecisions, sum_decisions
from vllm_vispec.train.objective import BALANCE, Objective, Rng
from vllm_vispec.train.rollout import MODES, rollout

SELECT = parse_compressor(COMPRESSORS["select"].compressor)


def two_turns() -> DraftBatch:
    """Two turns behind an image, one before any, one in a text."""
    samples = [
        random_sample(30, ((4, 12),), answers=[(1, 3), (15, 20), (24, 30)]),
        random_sample(22, (), answers=[(9, 22)]),
    ]
    return pad_batch(samples)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_gate_reads_the_last_token_before_an_answer() -> None:
    answer = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    assert gate_rows(answer).int().tolist() == [
        [0, 1, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]


def test_a_decision_holds_until_the_next_turn() -> None:
    draft, batch = random_draft(COMPRESSORS["select"]), two_turns()
    found = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    assert found is not None
    assert found.sees_G.tolist() == [False, True, True, False]
    assert found.turn_BL[0].tolist() == [0] * 14 + [1] * 9 + [2] * 7
    assert found.turn_BL[1].tolist() == [4] * 8 + [3] * 22
    states = torch.stack(
        [batch.hidden_BLD[0, 0], *batch.hidden_BLD[0, [14, 23]], batch.hidden_BLD[1, 8]]
    )
    assert draft.compressor is not None
    expected = draft.compressor.decide(states)
    assert torch.equal(found.output.choice_G, expected.choice_G)
    branch_BL = torch.full(batch.ids_BL.shape, -1)
    branch_BL[0, 5] = 2
    bias = found.key_bias(branch_BL).scores(first=13)
    assert bias.shape == (2, 17, 30)
    chosen = [0.0 if int(c) == 2 else HIDDEN_BIAS for c in expected.choice_G[:3]]
    # Row 13 belongs to the first turn still, row 14 is read by the second's gate.
    assert bias[0, :, 5].tolist() == [chosen[0]] + [chosen[1]] * 9 + [chosen[2]] * 7
    assert not bias[1].any()
    assert not bias[0, :, :5].any()


def test_heads_without_a_gate_decide_nothing() -> None:
    batch = two_turns()
    for name in ("reference", "concat", "eagle"):
        draft = random_draft(HEADS[name])
        assert decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs) is None


def test_a_batch_without_an_answer_has_no_turns() -> None:
    draft = random_draft(COMPRESSORS["select"])
    batch = pad_batch([random_sample(12, ((2, 6),), answers=[])])
    found = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs, generator())
    assert found is not None
    assert len(found.output.choice_G) == 0
    (out,) = rollout(draft, batch, 1)
    assert bool(torch.isfinite(out.state_BLD).all())
    sums = Objective(draft, torch.randn(64, 32), LossSettings(name="specvlm"))(batch)
    assert float(sums.loss.detach()) == 0.0


def test_an_image_alone_is_decided_by_its_last_token() -> None:
    draft = random_draft(COMPRESSORS["select"])
    batch = pad_batch([random_sample(20, ((0, 12),), answers=[(12, 20)])])
    found = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    assert found is not None
    assert found.sees_G.tolist() == [True]
    assert draft.compressor is not None
    expected = draft.compressor.decide(batch.hidden_BLD[:1, 11])
    assert torch.equal(found.output.choice_G, expected.choice_G)


def test_only_training_draws() -> None:
    draft, batch = random_draft(COMPRESSORS["select"]), pad_batch(all_samples())
    arguments = (draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    plain, again = decide(*arguments), decide(*arguments)
    drawn = [decide(*arguments, generator(seed)) for seed in (1, 1, 2)]
    choices = [one.output.choice_G for one in (plain, again, *drawn) if one is not None]
    assert torch.equal(choices[0], choices[1])
    assert torch.equal(choices[2], choices[3])
    assert not torch.equal(choices[2], choices[4])
    # Nothing of the global source of randomness is used either.
    before = torch.get_rng_state()
    first, second = (rollout(draft, batch, 2)[1].state_BLD for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_every_parameter_of_select_learns_from_a_batch() -> None:
    draft, batch = random_draft(COMPRESSORS["select"]), pad_batch(all_samples() * 4)
    objective = Objective(draft, torch.randn(64, 32), LossSettings(name="specvlm"))
    objective(batch, Rng(gate=generator(3))).loss.backward()
    silent = [
        name for name, p in draft.named_parameters() if p.grad is None or not bool(p.grad.any())
    ]
    assert silent == []


@pytest.mark.parametrize("mode", MODES)
def test_the_gates_gradient_is_what_the_loss_changes_by(mode: str) -> None:
    draft, batch = random_draft(COMPRESSORS["weighted"]), two_turns()
    assert draft.compressor is not None
    assert draft.compressor.gate is not None
    bias = draft.compressor.gate.out_proj.bias
    wide = draft.double(), batch.to("cpu", torch.float64)

    def loss() -> torch.Tensor:
        outputs = rollout(*wide, 3, mode)
        return torch.stack([(one.state_BLD[one.counts_BL] ** 2).sum() for one in outputs]).sum()

    (gradient,) = torch.autograd.grad(loss(), [bias])
    assert float(gradient.abs().max()) > 1e-3
    step = 1e-2
    for index in range(len(bias)):
        with torch.no_grad():
            bias[index] += step
            more = loss()
            bias[index] -= 2 * step
            less = loss()
            bias[index] += step
        slope = float(more - less) / (2 * step)
        assert slope == pytest.approx(float(gradient[index]), rel=0.02, abs=1e-3)


def test_the_load_balance_is_a_part_of_selects_loss() -> None:
    batch = pad_batch(all_samples())
    head = torch.randn(64, 32, generator=generator())

    def sums(name: str, weight: float) -> tuple[float, dict[str, float]]:
        objective = Objective(
            random_draft(COMPRESSORS[name]), head, LossSettings(name="specvlm", balance=weight)
        )
        found = objective(batch)
        parts = {key: float(value) for key, value in found.parts.items() if key != "total"}
        assert set(parts) == set(objective.part_names)
        return float(found.loss.detach()), parts

    with_it, parts = sums("select", 0.5)
    without, fewer = sums("select", 0.0)
    assert set(parts) - set(fewer) == {BALANCE}
    assert with_it - without == pytest.approx(0.5 * parts[BALANCE], rel=1e-3)
    assert set(sums("weighted", 0.5)[1]) == {"feature", "ce"}


def test_the_balance_counts_turns_with_images_only() -> None:
    draft, batch = random_draft(COMPRESSORS["select"]), two_turns()
    objective = Objective(draft, torch.randn(64, 32), LossSettings(name="specvlm"))
    found = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    assert found is not None
    sums = objective(batch)
    wanted = float(balance(found.of_images()).detach())
    assert float(sums.parts[BALANCE]) / sums.rows == pytest.approx(wanted, rel=1e-5)
    assert GateDecisions.from_sums(sums.decisions.tolist()).to_json(SELECT)["turns"] == 2


def test_the_histogram_adds_up() -> None:
    share = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])
    output = GateOutput(share.log(), share, torch.tensor([0, 1]))
    one = GateDecisions.from_sums(sum_decisions(output).tolist())
    spec = parse_compressor("select(prune:3,conv:2,text_only)")
    both = GateDecisions() + one + one + GateDecisions()
    assert both.to_json(spec)["turns"] == 4
    assert both.to_json(spec)["chosen"] == {"prune:3": 0.5, "conv:2": 0.5, "text_only": 0.0}
    assert math.isclose(sum(both.to_json(spec)["share"].values()), 1.0, abs_tol=1e-3)
    assert both.describe(spec) == "prune:3 0.50, conv:2 0.50, text_only 0.00"
    assert GateDecisions().to_json(spec) == {}
    assert GateDecisions.from_sums([]) == GateDecisions()
