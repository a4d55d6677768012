"""Tokens of compressors in the engine's rows, and the gate's decisions, against the PyTorch plan.

Shapes: D hidden size, M tokens, K branches.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.spec_decode.test_layout import feature
from tests.support.heads import BASE
from vllm_vispec.compressors.gated import GatedRowTable, query_scale
from vllm_vispec.compressors.spec import parse_compressor
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.models.vispec import make_compressor, make_rows
from vllm_vispec.reference import plan_rows
from vllm_vispec.spec_decode.adaptor import ImageAdaptor, TextFusion
from vllm_vispec.spec_decode.draft_rows import DraftRows
from vllm_vispec.spec_decode.step import RequestRows

SELECT = "select(prune:3,pool:2,resampler:2,text_only)"
SPECS = (
    "prune:3",
    "pool:2",
    "conv:2",
    "resampler:3",
    "text_only",
    "concat(prune:2,conv:2,resampler:2)",
    SELECT,
)
MAX_ROWS = 64
SIZE = BASE.hidden_size


def head_of(compressor: str, global_feature: bool = False) -> HeadConfig:
    values = asdict(BASE) | {"compressor": compressor, "num_query_tokens": 1}
    return HeadConfig(**(values | {"global_feature": global_feature}))


def draft_rows(head: HeadConfig, max_requests: int = 4) -> tuple[DraftRows, Any]:
    """The engine's rows of a head with random weights, without vLLM's layers."""
    torch.manual_seed(0)
    rows, fusion = make_rows(head, 8, MAX_ROWS, max_requests), TextFusion(SIZE)
    torch.nn.init.normal_(fusion.weight)
    adaptor = ImageAdaptor(head) if head.has_adaptor else None
    compressor = make_compressor(head)
    assert compressor is not None
    if compressor.gate is not None:
        torch.nn.init.normal_(compressor.gate.out_proj.weight)
    parts = {"rows": rows, "fusion": fusion, "adaptor": adaptor, "compressor": compressor}
    model = SimpleNamespace(head=head, **parts)
    return DraftRows(SimpleNamespace(model=model), max_requests), model  # type: ignore[arg-type]


def random_prompt(rng: random.Random) -> tuple[list[Any], list[tuple[int, int]], int]:
    features, spans, cursor = [], [], rng.choice([0, 0, 1, 5])
    for index in range(rng.randint(1, 4)):
        end = cursor + rng.randint(1, 9)
        features.append(feature(str(index), (cursor, end)))
        spans.append((cursor, end))
        cursor = end + rng.choice([0, 1, 2, 4])
    return features, spans, cursor + rng.randint(1, 6)


def embeddings_of(spans: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {str(i): torch.randn(b - a, SIZE) for i, (a, b) in enumerate(spans)}


def filled(
    found: DraftRows, rows: Any, features: list[Any], sizes: list[int], embeds: Mapping
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and offsets of a prompt's rows that come in chunks."""
    ids, offsets, first = [], [], 0
    for size in sizes:
        found.set_step([RequestRows("r", features, first, size)], embeds)
        ids.append(rows.row_ids[:size].clone())
        offsets.append(rows.batch_offset[:size].clone())
        first += size
    return torch.cat(ids), torch.cat(offsets)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("compressor", SPECS)
@torch.no_grad()
def test_tokens_stand_where_the_plan_says_however_the_prompt_is_cut(
    compressor: str, seed: int
) -> None:
    rng = random.Random(seed)
    features, spans, length = random_prompt(rng)
    found, model = draft_rows(head_of(compressor))
    embeds = embeddings_of(spans)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(rng.randint(1, 7), length - sum(sizes)))
    ids, offsets = filled(found, model.rows, features, sizes, embeds)
    spec = parse_compressor(compressor)
    plan = plan_rows(length, spans, 1, compressor=spec)
    numbers = {span: i for i, span in enumerate(spans)}
    by_start = {max(a, 1): numbers[a, b] for a, b in spans}
    kept = dict(zip(plan.positions, range(len(plan.positions)), strict=True))
    for row in range(length):
        row_id = int(ids[row])
        if row not in kept:
            assert row_id == model.rows.ids.masked
            continue
        index = kept[row]
        if plan.token_of_row[index] < 0:
            assert row_id == 0
            continue
        branch = plan.branch_of_row[index] if spec.gated else 0
        assert row_id == model.rows.ids.branch(branch)
        start, end = plan.images[plan.image_of_row[index]]
        image_ND = embeds[str(by_start[start])][-(end - start) :]
        (tokens_MD,) = model.compressor([image_ND])
        wanted_D = F.linear(tokens_MD[plan.token_of_row[index]], model.fusion.weight[:, :SIZE])
        torch.testing.assert_close(offsets[row], wanted_D, atol=1e-4, rtol=1e-4)
    assert found.table.stats.misses == 0


def test_an_image_in_chunks_is_compressed_once() -> None:
    found, model = draft_rows(head_of("pool:2"))
    calls: list[int] = []
    model.compressor.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    features, embeds = [feature("0", (2, 14))], {"0": torch.randn(12, SIZE)}
    filled(found, model.rows, features, [4, 3, 4, 6], embeds)
    assert calls == [1]
    found.clear()
    filled(found, model.rows, features, [17], embeds)
    assert calls == [1, 1]


def test_tokens_beyond_the_bound_are_forgotten() -> None:
    found, _ = draft_rows(head_of("prune:1"))
    assert found._tokens is not None
    for name in "abc":
        embeds = {name: torch.randn(30, SIZE)}
        found.set_step([RequestRows(name, [feature(name, (1, 31))], 0, 40)], embeds)
    assert [part.identifier for part in found._tokens._known] == ["b", "c"]


@pytest.mark.parametrize("global_feature", [False, True])
def test_an_image_without_embeddings_is_masked_and_counted(
    global_feature: bool, caplog: pytest.LogCaptureFixture
) -> None:
    request = RequestRows("r", [feature("0", (2, 8))], 0, 12)
    found, _ = draft_rows(head_of("text_only"))
    found.set_step([request], {})
    assert found.table.stats.misses == 0
    found, model = draft_rows(head_of("pool:2", global_feature))
    for _ in range(2):
        found.set_step([request], {})
        masked = model.rows.ids.masked
        assert model.rows.row_ids[:12].tolist() == [0, *[masked] * 6, *[0] * 5]
        assert found.table.stats.misses == 1


def gate_state(value: float) -> torch.Tensor:
    """States [12, D] of which only row 9, the last prompt token's, is of interest."""
    state = torch.full((12, SIZE), 7.0)
    state[9] = value * torch.linspace(-1, 1, SIZE)
    return state


def ask(name: str, first: int = 0, count: int = 10) -> RequestRows:
    return RequestRows(name, FEATURES[name], first, count, num_prompt_tokens=10)


FEATURES = {name: [feature(name, (2, 7))] for name in "abcdefghijklmnopqrstuvwxyz"}
EMBEDS = {name: torch.randn(5, SIZE) for name in FEATURES}


@torch.no_grad()
def test_a_gate_decides_at_the_prompts_end_and_for_its_request_alone() -> None:
    found, model = draft_rows(head_of("weighted(prune:2,pool:2)"))
    rows: GatedRowTable = model.rows
    state = torch.cat((gate_state(1.0)[:10], gate_state(-3.0)[:10]))
    found.set_step([ask("a"), ask("b")], EMBEDS, state)
    wanted_2K = model.compressor.decide(state[[9, 19]]).bias_GK * query_scale(BASE.head_dim)
    torch.testing.assert_close(rows.batch_branch_query[[9, 19]], wanted_2K)
    assert not torch.allclose(*wanted_2K)
    found.select_rows(torch.tensor([9, 19]))
    torch.testing.assert_close(rows.batch_branch_query[:2], wanted_2K)
    # Decoding: other rows, another order, a request without images between them.
    text = RequestRows("text", [], 30, 2, num_prompt_tokens=10)
    found.set_step([ask("b", 12, 2), text, ask("a", 14, 2)], {}, torch.zeros(6, SIZE))
    torch.testing.assert_close(rows.batch_branch_query[0], wanted_2K[1])
    assert rows.batch_branch_query[2:4].eq(0).all()
    torch.testing.assert_close(rows.batch_branch_query[4], wanted_2K[0])


@torch.no_grad()
def test_a_decision_is_that_of_the_whole_prompt_however_it_comes() -> None:
    """In chunks, behind a cached prefix, and behind the prompt after a preemption."""
    wanted = None
    for sizes in ([10], [4, 6], [9, 1]):
        found, model = draft_rows(head_of(SELECT))
        first, state = 0, gate_state(1.0)
        for size in sizes:
            found.set_step([ask("a", first, size)], EMBEDS, state[first : first + size])
            first += size
        code = model.rows.batch_branch_query[sizes[-1] - 1].clone()
        assert wanted is None or torch.equal(code, wanted)
        wanted = code
    found.set_step([ask("a", 12, 5)], {}, torch.zeros(5, SIZE))
    assert torch.equal(model.rows.batch_branch_query[4], wanted)


@torch.no_grad()
def test_the_least_recent_decision_makes_room() -> None:
    found, model = draft_rows(head_of(SELECT), max_requests=1)
    assert found.gate is not None
    for name in "abcd":
        found.set_step([ask(name)], EMBEDS, gate_state(1.0)[:10])
    found.set_step([ask("a", 12, 1)], {}, torch.zeros(1, SIZE))
    found.set_step([ask("e")], EMBEDS, gate_state(1.0)[:10])
    decisions = {name: found.gate.decision_of(name) for name in "abcde"}
    assert decisions["b"] == 0
    assert sorted(decisions.values()) == [0, 1, 2, 3, 4]
    assert len(model.rows.branch_query) == 5
    # A prompt that is one image is decided at its last token.
    request = RequestRows("r", [feature("0", (0, 6))], 0, 6, num_prompt_tokens=6)
    found.set_step([request], {"0": torch.randn(6, SIZE)}, torch.randn(6, SIZE))
    assert bool(model.rows.batch_branch_query[5].ne(0).any())
