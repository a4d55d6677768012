"""Compressors of images: primitives against plain loops, and combinations.

Tensor names end in their shape: T embeddings of one image, M tokens, D hidden, G prompts, K
branches.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vllm_vispec.compressors.compressor import COMPRESSORS, ImageCompressor
from vllm_vispec.compressors.gate import DECISIONS
from vllm_vispec.compressors.places import num_tokens, place_tokens
from vllm_vispec.compressors.spec import COMBINATIONS, PRIMITIVES, parse_compressor

WIDTH, HEADS = 16, 4
# A ratio larger than the image, one that divides it, one that does not, a single embedding.
SIZES = (7, 12, 1, 30, 12)
TEXTS = ("prune:3", "pool:3", "conv:3", "resampler:2", "text_only", "identity", "conv:20")
COMBINED = tuple(COMBINATIONS)


def make(text: str, bias: bool = True) -> ImageCompressor:
    """A compressor with random weights, in double precision."""
    torch.manual_seed(0)
    compressor = ImageCompressor(parse_compressor(text), WIDTH, HEADS, bias).double()
    for parameter in compressor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return compressor.eval()


def images_of(sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in sizes]


def stretches(size: int, ratio: int) -> list[list[int]]:
    """Embeddings of an image cut into `size // ratio` stretches of nearly one length."""
    count = max(1, size // ratio)
    owner = [next(k for k in range(count) if n < (k + 1) * size // count) for n in range(size)]
    return [[n for n in range(size) if owner[n] == k] for k in range(count)]


def naive_prune(image_TD: Tensor, ratio: int, _: ImageCompressor) -> list[Tensor]:
    return [image_TD[part[(len(part) - 1) // 2]] for part in stretches(len(image_TD), ratio)]


def naive_pool(image_TD: Tensor, ratio: int, _: ImageCompressor) -> list[Tensor]:
    return [
        sum((image_TD[n] for n in part), torch.zeros(WIDTH).double()) / len(part)
        for part in stretches(len(image_TD), ratio)
    ]


def naive_conv(image_TD: Tensor, ratio: int, compressor: ImageCompressor) -> list[Tensor]:
    state = compressor.branches[0].state_dict()
    kernel = state["kernel.weight"].unflatten(1, (ratio, WIDTH))
    found = []
    for part in stretches(len(image_TD), ratio):
        out_D = state["kernel.bias"].clone()
        for tap in range(ratio):
            if part[0] + tap < len(image_TD):
                out_D += kernel[:, tap] @ image_TD[part[0] + tap]
        found.append(out_D)
    return found


def naive_resampler(image_TD: Tensor, queries: int, compressor: ImageCompressor) -> list[Tensor]:
    state = compressor.branches[0].attention.state_dict()
    width = WIDTH // HEADS
    keys = [state["k_proj.weight"] @ row + state["k_proj.bias"] for row in image_TD]
    values = [state["v_proj.weight"] @ row + state["v_proj.bias"] for row in image_TD]
    found = []
    for query in range(queries):
        parts = []
        for head in range(HEADS):
            own = slice(head * width, (head + 1) * width)
            scores = [state["query"][query, head] @ key[own] / width**0.5 for key in keys]
            shares = torch.stack(scores).softmax(0)
            parts.append(sum(s * value[own] for s, value in zip(shares, values, strict=True)))
        found.append(state["o_proj.weight"] @ torch.cat(parts))
    return found


def naive_text_only(image_TD: Tensor, _: int, __: ImageCompressor) -> list[Tensor]:
    return []


def naive_identity(image_TD: Tensor, _: int, __: ImageCompressor) -> list[Tensor]:
    return list(image_TD)


NAIVE: dict[str, Callable[[Tensor, int, ImageCompressor], list[Tensor]]] = {
    "prune": naive_prune,
    "pool": naive_pool,
    "conv": naive_conv,
    "resampler": naive_resampler,
    "text_only": naive_text_only,
    "identity": naive_identity,
}


def test_registry_is_complete() -> None:
    assert set(COMPRESSORS) == {*PRIMITIVES} - {"query"} == set(NAIVE)
    assert set(DECISIONS) == {name for name, entry in COMBINATIONS.items() if entry.gated}


@pytest.mark.parametrize("text", TEXTS)
def test_primitive_is_the_plain_loop(text: str) -> None:
    compressor, images = make(text), images_of()
    spec = compressor.spec
    for image_TD, found_MD in zip(images, compressor(images), strict=True):
        wanted = NAIVE[spec.name](image_TD, spec.amount, compressor)
        assert len(found_MD) == len(wanted) == num_tokens(spec, len(image_TD))
        if wanted:
            torch.testing.assert_close(found_MD, torch.stack(wanted))


@pytest.mark.parametrize("text", [*TEXTS, *COMBINED])
def test_batch_is_one_by_one_and_branch_by_branch(text: str) -> None:
    compressor, images = make(text), images_of()
    for image_TD, found_MD in zip(images, compressor(images), strict=True):
        torch.testing.assert_close(found_MD, compressor([image_TD])[0])
        parts = [branch([image_TD]) for branch in compressor.branches]
        torch.testing.assert_close(found_MD, torch.cat(parts))
        places = place_tokens(compressor.spec, len(image_TD))
        assert max(places.tokens.tolist(), default=-1) < len(found_MD)
    assert compressor([]) == []


@pytest.mark.parametrize("text", ["conv:3", "resampler:2", "weighted", "concat", "select"])
def test_every_parameter_learns(text: str) -> None:
    compressor, images = make(text), images_of((7, 9))
    loss = sum(tokens.square().sum() for tokens in compressor(images))
    if compressor.gate is not None:
        # Even logits have no gradient under a loss that only counts them: weigh the biases.
        output = compressor.decide(torch.randn(3, WIDTH, dtype=torch.float64))
        loss = loss + (output.share_GK * torch.arange(len(compressor.branches))).sum()
    loss.backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias of keys shifts all scores of a query alike, so it has none.
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_fresh_conv_is_nearly_the_mean() -> None:
    compressor = ImageCompressor(parse_compressor("conv:3"), WIDTH, HEADS, True)
    compressor.init_weights(torch.Generator().manual_seed(0))
    image_TD = images_of((12,))[0].float()
    mean_MD = image_TD.unflatten(0, (4, 3)).mean(1)
    torch.testing.assert_close(compressor([image_TD])[0], mean_MD, atol=0.5, rtol=0)


@pytest.mark.parametrize("text", ["conv:3", "resampler:2", "select"])
def test_start_follows_its_generator(text: str) -> None:
    def started(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(5)
        compressor = ImageCompressor(parse_compressor(text), WIDTH, HEADS, True)
        compressor.init_weights(torch.Generator().manual_seed(seed))
        return compressor.state_dict()

    one, same, other = started(0), started(0), started(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_gate_reads_the_state_only() -> None:
    compressor = make("select")
    state_GD = torch.randn(4, WIDTH, dtype=torch.float64)
    together = compressor.decide(state_GD).bias_GK
    alone = torch.cat([compressor.decide(one_D[None]).bias_GK for one_D in state_GD])
    assert torch.equal(together, alone)
