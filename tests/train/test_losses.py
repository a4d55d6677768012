"""Every loss against a plain loop over rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vllm_vispec.train.losses import LOSSES, RANKS, TERMS, LossInputs, get_loss
from vllm_vispec.utils.errors import ViSpecError

ROWS, HIDDEN, VOCAB = 7, 6, 23


def inputs(rows: int = ROWS, vocab: int = VOCAB) -> LossInputs:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 2

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


@pytest.mark.parametrize("name", TERMS)
def test_every_term_equals_a_loop(name: str) -> None:
    case = inputs()
    part = get_loss("kl", **{"kl": 0.0, name: 1.0})(case)[name]
    expected = sum(naive(name, case, row) for row in range(ROWS)) / ROWS
    assert part.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_total_is_the_weighted_sum(name: str) -> None:
    case = inputs()
    parts = get_loss(name)(case)
    assert set(parts) == {*LOSSES[name], "total"}
    expected = sum(weight * parts[term].item() for term, weight in LOSSES[name].items())
    assert parts["total"].item() == pytest.approx(expected, rel=1e-5)


def test_published_weights_are_the_defaults() -> None:
    assert LOSSES["vispec"] == {"l1": 10.0, "rank": 0.1}
    assert LOSSES["eagle"] == LOSSES["specvlm"] == {"feature": 1.0, "ce": 0.1}
    assert RANKS == 10


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_row_the_loss_is_zero_with_zero_gradients(name: str) -> None:
    case = inputs(rows=0)
    parts = get_loss(name)(case)
    assert all(part.item() == 0 for part in parts.values())
    parts["total"].backward()
    assert case.draft_state_ND.grad is not None
    assert case.draft_logits_NV.grad is not None


@pytest.mark.parametrize("name", ["vispec", "kl"])
def test_a_perfect_draft_has_no_gradient_in_its_distribution(name: str) -> None:
    case = inputs()
    logits = case.target_logits_NV.clone().requires_grad_()
    perfect = replace(case, draft_logits_NV=logits)
    parts = get_loss(name, rank=0)(perfect)
    assert parts["total"].item() == pytest.approx(0, abs=1e-6)


def test_a_small_vocabulary_has_fewer_ranks() -> None:
    case = inputs(vocab=4)
    expected = sum(naive("rank", case, row) for row in range(ROWS)) / ROWS
    assert get_loss("vispec")(case)["rank"].item() == pytest.approx(expected, rel=1e-5)


def test_low_precision_logits_give_a_float32_loss() -> None:
    case = inputs()
    fields = {n: x.bfloat16() if x.is_floating_point() else x for n, x in vars(case).items()}
    low = LossInputs(**fields)
    total = get_loss("vispec")(low)["total"]
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(get_loss("vispec")(case)["total"].item(), rel=0.05)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("mse", {}, "unknown"),
        ("vispec", {"l2": 1.0}, "unknown"),
        ("vispec", {"l1": -1.0}, "negative"),
        ("kl", {"kl": 0.0}, "give one"),
    ],
)
def test_bad_settings_are_refused(name: str, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        get_loss(name, **weights)
