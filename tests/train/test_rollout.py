"""Rollout passes equal the step-by-step draft, however samples are batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.train.samples import HEADS, all_samples, random_draft, random_sample
from vllm_vispec.reference import Prefill, ViSpecDraft
from vllm_vispec.train.rollout import MODES, ROW_MULTIPLE, PassOutput, rollout
from vllm_vispec.train.target import DraftBatch, Observed, pad_batch

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PASSES = 4


def counted(output: PassOutput, sample: int) -> list[int]:
    """Counted rows of a sample."""
    return output.counts_BL[sample].nonzero()[:, 0].tolist()


def answer_start(sample: Observed, token: int) -> int:
    """Where the answer that holds a token begins, as prefill takes it."""
    start = token
    while start > 0 and sample.answer[start - 1]:
        start -= 1
    return max(start, 1)


def prefill(draft: ViSpecDraft, sample: Observed, last: int) -> Prefill:
    """The compact rows of tokens 0..last, the one after them known."""
    return draft.prefill(
        sample.embeds_LD[: last + 1],
        sample.embeds_LD[last + 1],
        sample.hidden_LD[: last + 1],
        [run for run in sample.runs if run[1] <= last + 1],
        answer_start(sample, last + 1),
    )


def chain(draft: ViSpecDraft, sample: Observed, row: int, steps: int) -> torch.Tensor:
    """The last state of a chain from `row` whose drafted tokens are the gold ones."""
    start = prefill(draft, sample, row)
    state, cache = start.out_ND[-1], start.cache
    for position in range(row + 1, row + steps):
        embed_D = sample.embeds_LD[position + 1]
        state, _, cache = draft.step(
            embed_D, state, start.global_D, position, cache, start.key_bias_N
        )
    return state


@pytest.mark.parametrize("name", HEADS)
def test_exact_passes_equal_prefill_and_steps(name: str) -> None:
    draft = random_draft(HEADS[name])
    samples = all_samples()
    outputs = rollout(draft, pad_batch(samples), PASSES + 1)
    compared = 0
    for b, sample in enumerate(samples):
        for depth, output in enumerate(outputs):
            for row in counted(output, b)[::4]:
                first = row - depth
                # The engine begins behind an answer token, never behind an image's.
                if not sample.answer[first + 1]:
                    continue
                state = chain(draft, sample, first, depth + 1)
                torch.testing.assert_close(output.state_BLD[b, row], state, **CLOSE)
                compared += depth > 0
    assert compared > 30


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HEADS)
def test_a_batch_equals_its_samples_one_by_one(name: str, mode: str) -> None:
    draft = random_draft(HEADS[name])
    samples = all_samples()
    together = rollout(draft, pad_batch(samples), PASSES, mode)
    for b, sample in enumerate(samples):
        alone = rollout(draft, pad_batch([sample]), PASSES, mode)
        length = len(sample.token_ids)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one.counts_BL[0], all_of_them.counts_BL[b, :length])
            assert not all_of_them.counts_BL[b, length:].any()
            rows = counted(one, 0)
            torch.testing.assert_close(
                one.state_BLD[0, rows], all_of_them.state_BLD[b, rows], **CLOSE
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["automodel", "concat", "weighted", "select"])
def test_gradients_of_a_batch_are_the_sum_over_samples(name: str, mode: str) -> None:
    draft = random_draft(HEADS[name])
    samples = all_samples()

    def loss(batch: DraftBatch) -> torch.Tensor:
        outputs = rollout(draft, batch, 3, mode)
        return sum((o.state_BLD[o.counts_BL] ** 2).sum() for o in outputs)

    used = [p for name, p in draft.named_parameters() if not name.startswith("embed_tokens")]
    together = torch.autograd.grad(loss(pad_batch(samples)), used)
    alone = [
        torch.autograd.grad(loss(pad_batch([sample])), used, allow_unused=True)
        for sample in samples
    ]
    # One scale for all: a key bias shifts all scores alike, so its true gradient is zero.
    scale = max(float(gradient.abs().max()) for gradient in together)
    for index, gradient in enumerate(together):
        parts = [part[index] for part in alone if part[index] is not None]
        torch.testing.assert_close(sum(parts) / scale, gradient / scale, **CLOSE)


def test_counted_rows_are_chains_inside_one_answer() -> None:
    batch = pad_batch([random_sample(20, ((2, 5),), answers=[(8, 12), (15, 19)])])
    exact, shifted = (rollout(random_draft(HEADS["eagle"]), batch, 4, mode) for mode in MODES)
    first = [6, 7, 8, 9, 13, 14, 15, 16]
    assert [counted(output, 0) for output in exact] == [
        first,
        [7, 8, 9, 14, 15, 16],
        [8, 9, 15, 16],
        [9, 16],
    ]
    assert [counted(output, 0) for output in shifted] == [first] * 4


def test_shifted_passes_read_the_output_one_row_earlier() -> None:
    draft = random_draft(HEADS["automodel"])
    sample = random_sample(19)
    first, second = rollout(draft, pad_batch([sample]), 2, "shifted")
    moved = torch.cat((sample.hidden_LD[:1], first.state_BLD[0, :-1]))
    (again,) = rollout(draft, pad_batch([replace(sample, hidden_LD=moved)]), 1)
    rows = counted(second, 0)
    torch.testing.assert_close(second.state_BLD[0, rows], again.state_BLD[0, rows], **CLOSE)


@pytest.mark.parametrize("name", ["reference", "select"])
def test_no_counted_row_still_gives_finite_states_and_gradients(name: str) -> None:
    draft = random_draft(HEADS[name])
    batch = pad_batch([random_sample(14, ((1, 6),), answers=[])])
    outputs = rollout(draft, batch, 3)
    assert not any(bool(output.counts_BL.any()) for output in outputs)
    total = torch.stack([o.state_BLD[o.counts_BL].sum() for o in outputs]).sum()
    total.backward()
    assert bool(torch.isfinite(draft.fc.weight.grad).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["automodel", "concat", "weighted"])
def test_autocast_stays_near_float32(name: str, mode: str) -> None:
    draft = random_draft(HEADS[name])
    batch = pad_batch(all_samples())
    exact = rollout(draft, batch, 3, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = rollout(draft, batch, 3, mode)
    for one, other in zip(exact, rough, strict=True):
        wanted, found = one.state_BLD[one.counts_BL], other.state_BLD[other.counts_BL]
        gap = (wanted - found.float()).norm() / wanted.norm()
        assert 1e-6 < float(gap.detach()) < 0.05
    torch.stack([o.state_BLD[o.counts_BL].float().sum() for o in rough]).sum().backward()
    assert bool(torch.isfinite(draft.fc.weight.grad).all())


def test_noise_is_seeded_and_scaled_by_length() -> None:
    draft = random_draft(HEADS["reference"])
    batch = pad_batch([random_sample(20), random_sample(10)])

    def states(noise: float, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rollout(draft, batch, 1, noise=noise, generator=generator)[0].state_BLD

    assert torch.equal(states(0.2, 1), states(0.2, 1))
    assert not torch.equal(states(0.2, 1), states(0.2, 2))
    assert not torch.equal(states(0.2, 1), states(0.0, 1))
    torch.testing.assert_close(states(1e-9, 1), states(0.0, 1))


@pytest.mark.parametrize("name", ["reference", "select"])
def test_passes_computed_again_in_the_backward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pad_batch([random_sample(200, ((3, 9),)), random_sample(150)])

    def gradients(most: int) -> tuple[int, list[torch.Tensor]]:
        """Bytes that the forward pass leaves, and gradients."""
        monkeypatch.setattr("vllm_vispec.train.rollout.MOST_WEIGHT_BYTES", most)
        draft, held = random_draft(HEADS[name]), dict[int, int]()

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            outputs = rollout(draft, batch, PASSES)
        torch.stack([one.state_BLD[one.counts_BL].sum() for one in outputs]).sum().backward()
        return sum(held.values()), [w.grad for w in draft.parameters() if w.grad is not None]

    (whole, expected), (less, found) = gradients(2**40), gradients(0)
    assert less < 0.6 * whole
    assert all(map(torch.equal, found, expected))


def test_rows_that_are_not_read_skip_the_feed_forward_part() -> None:
    draft, seen = random_draft(HEADS["reference"]), []
    draft.layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    batch = pad_batch([random_sample(300, ((3, 200),), [(250, 280)])])
    outputs = rollout(draft, batch, PASSES)
    rows = [int(one.counts_BL.sum()) for one in outputs]
    assert rows == [30, 29, 28, 27]
    assert seen == [ROW_MULTIPLE * draft.config.hidden_size] * PASSES
