"""Every loss against a plain loop over rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.heads import BASE
from tests.train.samples import all_samples, random_draft
from vllm_vispec.train.config import LossSettings
from vllm_vispec.train.losses import (
    LOSSES,
    RANKS,
    TERMS,
    LossInputs,
    Objective,
    sum_terms,
    term_weights,
)
from vllm_vispec.train.target import pad_batch
from vllm_vispec.utils.errors import ViSpecError

ROWS, HIDDEN = 7, 6


def inputs(rows: int = ROWS, vocab: int = 23, dtype: torch.dtype = torch.float32) -> LossInputs:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 2).to(dtype)

    return LossInputs(
        draft_state_ND=normal(rows, HIDDEN).requires_grad_(),
        target_state_ND=normal(rows, HIDDEN),
        draft_logits_NV=normal(rows, vocab).requires_grad_(),
        target_logits_NV=normal(rows, vocab),
        gold_N=torch.randint(vocab, (rows,), generator=generator),
    )


def naive(name: str, case: LossInputs, row: int) -> float:
    """A term of one row, by plain loops."""
    logits = [x[row].tolist() for x in (case.draft_logits_NV, case.target_logits_NV)]
    draft, target = ([math.exp(x) / sum(map(math.exp, one)) for x in one] for one in logits)
    pairs = list(zip(draft, target, strict=True))
    if name == "l1":
        return sum(abs(q - p) for q, p in pairs)
    if name == "rank":
        best = sorted(range(len(target)), key=lambda token: -target[token])[:RANKS]
        chosen = [draft[token] for token in best]
        return -sum(math.log(chosen[i] / sum(chosen[i:])) for i in range(len(chosen)))
    if name == "feature":
        gaps = (case.draft_state_ND[row] - case.target_state_ND[row]).abs().tolist()
        return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)
    if name == "gold":
        return -math.log(draft[int(case.gold_N[row])])
    entropy = -sum(p * math.log(p) for p in target)
    return -sum(p * math.log(q) for q, p in pairs) - (entropy if name == "kl" else 0.0)


@pytest.mark.parametrize("vocab", [23, 4])
def test_every_term_equals_a_loop(vocab: int) -> None:
    case = inputs(vocab=vocab)
    sums = sum_terms(case, dict.fromkeys(TERMS, 2.0))
    for name in TERMS:
        expected = sum(naive(name, case, row) for row in range(ROWS))
        assert sums[name].item() == pytest.approx(expected, rel=1e-5), name
    total = 2 * sum(sums[name].item() for name in TERMS)
    assert sums["total"].item() == pytest.approx(total, rel=1e-5)


def test_weights_are_the_published_ones_unless_given() -> None:
    assert term_weights("vispec", {"rank": 0, "kl": 2}) == {"l1": 10.0, "kl": 2.0}


def test_without_a_row_the_loss_is_zero_with_zero_gradients() -> None:
    case = inputs(rows=0)
    sums = sum_terms(case, LOSSES["vispec_text"])
    assert all(one.item() == 0 for one in sums.values())
    sums["total"].backward()
    assert case.draft_state_ND.grad is not None
    assert case.draft_logits_NV.grad is not None


def test_low_precision_logits_give_a_float32_loss() -> None:
    totals = [
        sum_terms(inputs(dtype=dtype), LOSSES["vispec"])["total"]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert totals[0].dtype == torch.float32
    assert totals[0].item() == pytest.approx(totals[1].item(), rel=0.05)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("mse", {}, "loss.name is 'mse': use one of"),
        ("vispec", {"l2": 1.0}, "term 'l2' is unknown"),
        ("vispec", {"l1": -1.0}, "negative"),
        ("kl", {"kl": 0.0}, "give one"),
    ],
)
def test_bad_weights_are_refused(name: str, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        term_weights(name, weights)


def test_rows_in_chunks_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradients that they have all at once."""
    compute, seen = Objective._rows, []

    def count(self: Objective, state_ND: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        seen.append(len(state_ND))
        return compute(self, state_ND, *rest)

    monkeypatch.setattr(Objective, "_rows", count)
    batch, rows, found = pad_batch(all_samples()), list[int](), []
    for chunk_rows in (1000, 16):
        draft = random_draft(BASE)
        head_VD = torch.randn(64, BASE.hidden_size, generator=torch.Generator().manual_seed(1))
        settings = LossSettings(name="specvlm", passes=3, pass_decay=0.5, chunk_rows=chunk_rows)
        seen.clear()
        sums = Objective(draft, head_VD, settings)(batch)
        (sums.loss / 7).backward()
        rows.append(sum(seen))
        found.append([sums.loss, *sums.of_rows.values(), *(p.grad for p in draft.parameters())])
    assert len(seen) > 2 * 3
    assert max(seen) == 16
    assert rows[1] == rows[0]
    torch.testing.assert_close(found[1], found[0])
