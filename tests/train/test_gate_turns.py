"""The gate over batches: whose state it reads, which rows it rules, when it draws."""

from __future__ import annotations

import pytest
import torch

from tests.train.samples import COMPRESSORS, all_samples, random_draft, random_sample
from vllm_vispec.compressors.gate import HIDDEN_BIAS, balance
from vllm_vispec.compressors.spec import parse_compressor
from vllm_vispec.compressors.turns import gate_rows
from vllm_vispec.reference import decide
from vllm_vispec.train.acceptance import describe_gate
from vllm_vispec.train.config import LossSettings
from vllm_vispec.train.losses import BALANCE, Objective
from vllm_vispec.train.rollout import MODES, rollout
from vllm_vispec.train.target import DraftBatch, pad_batch


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
    objective(batch, gate=generator(3)).loss.backward()
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
    draft, batch = random_draft(COMPRESSORS["select"]), two_turns()
    head = torch.randn(64, 32, generator=generator())
    with_it, without = (
        Objective(draft, head, LossSettings(name="specvlm", balance=weight))(batch)
        for weight in (0.5, 0.0)
    )
    even = with_it.of_rows[BALANCE]
    assert with_it.of_rows.keys() - without.of_rows.keys() == {BALANCE}
    assert float((with_it.loss - without.loss).detach()) == pytest.approx(
        0.5 * float(even), rel=1e-3
    )
    # Turns with images only.
    found = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    assert found is not None
    wanted = float(balance(found.of_images()).detach())
    assert float(even / with_it.of_rows["rows"]) == pytest.approx(wanted, rel=1e-5)
    gate = describe_gate(with_it.decisions_2K, draft.config.compressor_spec)
    assert gate["turns"] == 2
    weighted = Objective(
        random_draft(COMPRESSORS["weighted"]), head, LossSettings(name="kl", balance=0.5)
    )
    assert BALANCE not in weighted.part_names


def test_shares_of_branches() -> None:
    sums_2K = torch.tensor([[2.0, 1.0, 1.0], [1.4, 1.9, 0.7]])
    spec = parse_compressor("select(prune:3,conv:2,prune:3)")
    assert describe_gate(sums_2K, spec) == {
        "turns": 4,
        "chosen": {"prune:3": 0.75, "conv:2": 0.25},
        "share": {"prune:3": 0.525, "conv:2": 0.475},
    }
    assert describe_gate(torch.zeros(2, 3), spec) == {}
    assert describe_gate(torch.zeros(2, 0), parse_compressor("query")) == {}
