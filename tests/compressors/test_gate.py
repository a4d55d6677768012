"""The gate: what it does to the branches, in training and without noise.

Tensor names end in their shape: D hidden, G prompts, K branches.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_vispec.compressors.gate import (
    DECISIONS,
    HIDDEN_BIAS,
    MIN_SHARE,
    GateOutput,
    balance,
    choose,
    gumbel_noise,
    weigh,
)


def test_choose_without_noise_is_argmax() -> None:
    logits_GK = torch.tensor([[0.1, 2.0, -1.0], [3.0, 2.9, 2.0]])
    output = choose(logits_GK, None, 1.0)
    assert output.choice_G.tolist() == [1, 0]
    hidden = HIDDEN_BIAS
    assert output.bias_GK.tolist() == [[hidden, 0.0, hidden], [0.0, hidden, hidden]]
    torch.testing.assert_close(output.share_GK, logits_GK.softmax(-1))


@pytest.mark.parametrize("logits", [[0.0, 0.0], [1e4, -1e4], [-1e4, 1e4]])
@pytest.mark.parametrize("name", list(DECISIONS))
def test_extreme_logits_stay_numbers(name: str, logits: list[float]) -> None:
    logits_GK = torch.tensor([logits], requires_grad=True)
    output = DECISIONS[name](logits_GK, None, 0.1)
    output.bias_GK.exp().sum().backward()
    assert output.bias_GK.isfinite().all()
    assert logits_GK.grad is not None
    assert logits_GK.grad.isfinite().all()


def test_choose_passes_the_gradient_of_the_softmax_straight_through() -> None:
    start_GK = torch.tensor([[0.3, -0.2, 0.1], [1.0, 0.0, -1.0]])
    noise_GK = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.1, 0.0]])
    temperature, weights = 0.7, torch.tensor([1.0, 2.0])
    logits_GK = start_GK.clone().requires_grad_()
    output = choose(logits_GK, noise_GK, temperature)
    assert output.choice_G.tolist() == [1, 0]
    picked_G = output.bias_GK.gather(1, output.choice_G[:, None])[:, 0]
    assert picked_G.tolist() == [0.0, 0.0]
    (weights * picked_G).sum().backward()
    # log of a share that is 1 in value: its gradient is that of the soft share itself.
    soft_GK = start_GK.clone().requires_grad_()
    shares_GK = ((soft_GK + noise_GK) / temperature).softmax(-1)
    (weights * shares_GK.gather(1, output.choice_G[:, None])[:, 0]).sum().backward()
    torch.testing.assert_close(logits_GK.grad, soft_GK.grad)


def test_noise_is_gumbel_and_reproducible() -> None:
    def draw(seed: int) -> Tensor:
        return gumbel_noise(torch.empty(20_000, 3), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    # Mean 0.5772 (Euler's constant), variance pi^2 / 6.
    assert draw(0).mean().item() == pytest.approx(0.5772, abs=0.02)
    assert draw(0).var().item() == pytest.approx(1.6449, abs=0.05)
    logits_K = torch.tensor([1.0, 0.0, -1.0])
    chosen = choose(logits_K.expand(20_000, -1), draw(2), 1.0).choice_G
    counts_K = torch.bincount(chosen, minlength=3) / len(chosen)
    torch.testing.assert_close(counts_K, logits_K.softmax(-1), atol=0.02, rtol=0)


def test_weigh_counts_keys_as_often_as_the_gate_says() -> None:
    logits_GK = torch.tensor([[0.0, 1.0, -1.0]])
    output = weigh(logits_GK, None, 1.0)
    torch.testing.assert_close(output.bias_GK.exp(), logits_GK.softmax(-1))
    assert output.choice_G.tolist() == [1]
    assert torch.equal(weigh(logits_GK, torch.ones(1, 3) * 9, 0.1).bias_GK, output.bias_GK)
    lost = weigh(torch.tensor([[0.0, -100.0]]), None, 1.0).bias_GK
    assert lost[0, 1].item() == pytest.approx(torch.tensor(MIN_SHARE).log().item())


def test_balance() -> None:
    """1 if shares and choices are even, the number of branches if one has all."""
    cases = (
        ([0, 1, 2, 3], [0.25, 0.25, 0.25, 0.25], 1.0),
        ([0, 0, 0, 0], [1.0, 0.0, 0.0, 0.0], 4.0),
        ([0, 0, 0, 0], [0.0, 1.0, 0.0, 0.0], 0.0),
    )
    for choices, shares, expected in cases:
        share_GK = torch.tensor([shares] * 4)
        output = GateOutput(torch.zeros_like(share_GK), share_GK, torch.tensor(choices))
        assert balance(output).item() == pytest.approx(expected)
