"""Every kind of draft drafts what its PyTorch reference drafts, in every situation, losslessly.

ViSpec heads themselves are the business of the other files here. The gates of these random heads
are strong, so that requests differ in what they decide.

Tensor names end in their shape: L prompt tokens, D hidden, K draft steps, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.comparison import Cold, Compared, compare, serve_cold
from tests.support.engine import Engine
from tests.support.runners import marks
from tests.support.spies import drafter, model_runner, watch_encoder
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import (
    Request,
    Results,
    drive_one_by_one,
    image_text,
    mixed_requests,
    words,
)

if TYPE_CHECKING:
    import torch
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

TOLERANCE = 1e-4
STEPS = 5
ROOMY: Mapping[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 8}
# Budgets that split prompts inside images, right before them and right behind them.
CHUNKS: Mapping[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 3}
# 9 usable blocks of 32 tokens as well: requests preempt each other.
TIGHT: Mapping[str, Any] = {**CHUNKS, "max_num_seqs": 8, "num_blocks": 10}
ENGINES = {"roomy": ROOMY, "chunks": CHUNKS, "tight": TIGHT}


@dataclass(frozen=True)
class Draft:
    """A draft, and in which situations it is compared.

    Images have 4 to 16 tokens; the smallest have fewer than some heads make of them.
    """

    make: Callable[[TinyStore, str], str]
    model: str = "EagleViSpecForCausalLM"
    situations: str = "roomy-together roomy-prefix_hit chunks-chunked chunks-together"
    count: int = 8
    sees_images: bool = True
    is_gated: bool = False
    is_accepted: bool = True
    kind: str = KIND


def _head(**changes: Any) -> Callable[[TinyStore, str], str]:
    return lambda tiny, kind: tiny.head(kind, checkpoint_format="canonical", **changes)


def _compressor(text: str, situations: str, global_feature: bool = False) -> Draft:
    make = _head(num_q=1, compressor=text, global_feature=global_feature)
    gated = text.startswith(("weighted", "select"))
    return Draft(
        make, situations=situations, count=1, sees_images=text != "text_only", is_gated=gated
    )


def _vlm(**changes: Any) -> Callable[[TinyStore, str], str]:
    return lambda tiny, kind: tiny.draft_vlm(kind, **changes)


EMBEDS, VLM = "EagleViSpecEmbedsForCausalLM", "EagleDraftVlmForCausalLM"
VLM_SITUATIONS = "roomy-together roomy-prefix_hit chunks-chunked"
TIGHT_SITUATIONS = "roomy-prefix_hit tight-chunked tight-together"
SELECT = "select(prune:2,pool:4,conv:3,resampler:2,text_only)"
DRAFTS: Mapping[str, Draft] = {
    "no_global": Draft(_head(num_q=3, global_feature=False)),
    "no_compress": Draft(_head(num_q=3, compress=False), EMBEDS),
    "neither": Draft(_head(num_q=3, compress=False, global_feature=False), EMBEDS),
    # A vision tower with deepstack columns.
    "qwen3_vl": Draft(
        _head(num_q=3, compress=False),
        EMBEDS,
        "roomy-together chunks-together",
        count=4,
        kind="qwen3_vl",
    ),
    "resampler": _compressor("resampler:5", "roomy-together"),
    "text_only": _compressor("text_only", "roomy-together"),
    "concat": _compressor("concat(prune:4,pool:4,conv:3,resampler:2)", TIGHT_SITUATIONS, True),
    "weighted": _compressor("weighted(prune:3,pool:3,conv:3)", "roomy-together"),
    "select": _compressor(SELECT, TIGHT_SITUATIONS, True),
    "draft_vlm": Draft(_vlm(), VLM, VLM_SITUATIONS, count=4),
    # Wider than the target with a tied table and no biases; one layer on a deepstack target.
    "wide_vlm": Draft(
        _vlm(tied=True, hidden=192, heads=4, kv_heads=2, qkv_bias=False),
        VLM,
        VLM_SITUATIONS,
        count=4,
        is_accepted=False,
    ),
    "deep_vlm": Draft(_vlm(layers=1), VLM, VLM_SITUATIONS, count=4, kind="qwen3_vl"),
}
SLOW_ELSEWHERE = ("no_global", "no_compress", "neither", "draft_vlm", "select")
ROWS = [
    *(
        pytest.param("v1", name, id=f"v1-{name}", marks=marks("v1", name != "draft_vlm"))
        for name in DRAFTS
    ),
    *(
        pytest.param("v2", name, id=f"v2-{name}", marks=marks("v2", True))
        for name in SLOW_ELSEWHERE
    ),
    pytest.param("v2-overlay", "select", id="v2-overlay-select", marks=marks("v2-overlay")),
]


@pytest.mark.parametrize(("runner", "name"), ROWS)
def test_kind(engine: Callable[..., Engine], tiny: TinyStore, runner: str, name: str) -> None:
    draft = DRAFTS[name]
    kind, options = draft.kind, {"draft": draft.make(tiny, draft.kind), "num_draft_tokens": STEPS}
    plain_engine = engine(runner, kind, **ROOMY)
    requests: list[Request] = plain_engine.once(requests_of, kind, draft.count)
    plain = plain_engine.once(drive_one_by_one, requests)
    first: FirstLook = engine(runner, kind, **options, **ROOMY).run(
        look, requests, str(tiny.target(kind)), options["draft"]
    )
    _assert_sound(draft, plain, first)
    for situation in draft.situations.split():
        where, _, what = situation.partition("-")
        ours = engine(runner, kind, **options, **ENGINES[where])
        found = compare(first.cold, ours, what, requests)
        _assert_same(found)
        _assert_arranged(situation, found)


def _assert_sound(draft: Draft, plain: Results, first: FirstLook) -> None:
    """Lossless, and drafting as in PyTorch; each image is encoded once."""
    assert first.model == draft.model
    assert _ids(first.cold[0]) == _ids(plain)
    accepted = sum(sum(rows[0].per_step_accepted) for rows in first.cold[0].values())
    assert accepted > 0 or not draft.is_accepted
    assert first.torch_gap < TOLERANCE
    # A draft that sees nothing of images drafts as if they were blank, all others do not.
    assert (first.blind_gap > 100 * TOLERANCE) == draft.sees_images
    if draft.model == VLM:
        assert first.encoded[0] == first.encoded[1] > 0
    assert bool(first.choices) == draft.is_gated
    if draft.is_gated:
        assert len({tuple(code) for code in first.choices.values()}) > 1


def _assert_same(found: Compared) -> None:
    """The drafts are the same whatever else goes on."""
    assert found.table["misses"] == 0
    for request, row in found.requests.items():
        assert row.same_ids, request
        assert row.gap < TOLERANCE, request
        assert row.shared > 0, request
        # A step that is cut short by a preemption is none that was there before.
        if not found.spy.preempted:
            assert row.accepted == row.cold_accepted, request
            assert row.shared == row.cold_steps, request


def _assert_arranged(situation: str, found: Compared) -> None:
    """The situation was what its name says."""
    if situation.endswith("prefix_hit"):
        assert sum(row.cached > 0 for row in found.requests.values()) >= 2
    elif situation.startswith(("chunks", "tight")):
        assert found.spy.split_images > 0
        assert bool(found.spy.preempted) == (situation == "tight-together")


def _ids(results: Results) -> dict[str, list[int]]:
    return {name: rows[0].token_ids for name, rows in results.items()}


# What follows runs in the child.


def requests_of(llm: LLM, kind: str, count: int) -> list[Request]:
    """Return mixed requests, one to compare with PyTorch, and some with images at borders.

    An image begins one token before, at and after the end of the first chunk. With the image right
    behind the chunk, the chunk's last row reads an embedding that the target itself needs in the
    next step only.
    """
    image = image_text(kind, 1)
    picture = Request("picture", f"Look: {image} and {image} what do you see", (4, 5), 16)
    requests = [*mixed_requests(kind, count, 20, seed=3), picture]
    tokenizer, border = llm.get_tokenizer(), CHUNKS["max_num_batched_tokens"]
    image_ids = tokenizer.encode(image, add_special_tokens=False)
    opening = len(image_ids) - 2 if len(image_ids) > 1 else 0

    def plain_ids(seed: int, length: int) -> list[int]:
        ids: list[int] = tokenizer.encode(words(seed, 4 * length), add_special_tokens=False)
        return ids[:length]

    for start in (border - 1, border, border + 1):
        ids = (*plain_ids(start, start - opening), *image_ids, *plain_ids(5, 9))
        requests.append(Request(f"border-{start}", "", (3,), 12, ids=ids))
    return [
        *requests,
        Request("deep-0", f"Look: {image} {words(40, 80)}", (2,), 24),
        Request("deep-1", f"Look: {image} and {image} {words(41, 80)}", (4, 5), 24),
        Request("cut-0", f"{words(42, 22)} {image} {words(43, 60)}", (7,), 24),
    ]


@dataclass(frozen=True)
class FirstLook:
    """A cold run, and what the draft is.

    Attributes:
        torch_gap: How far the first chain's logits are from the PyTorch draft's, relative to their
            size; ``blind_gap`` from those of a draft that reads nothing where the images are.
        encoded: Images that the vision tower saw, and images that there were.
        choices: What the gate, if the head has one, decided for each request it still knows.
    """

    cold: Cold
    model: str
    torch_gap: float
    blind_gap: float
    encoded: tuple[int, int]
    choices: dict[str, list[float]]


def look(llm: LLM, requests: list[Request], target: str, draft: str) -> FirstLook:
    """Serve each request alone and compare the first chain of "picture" with PyTorch's."""
    with watch_prefills(llm) as prefills, watch_encoder(llm) as encoded:
        cold = serve_cold(llm, requests)
    gaps = torch_gaps(Path(target), draft, prefills["picture"], cold)
    images = sum(len(set(request.images)) for request in requests)
    model = drafter(llm).model
    return FirstLook(cold, type(model).__name__, *gaps, (sum(encoded), images), choices(llm))


def choices(llm: LLM) -> dict[str, list[float]]:
    """Return the gate's decisions, as codes of the draft's queries."""
    rows, model = drafter(llm).draft_rows, drafter(llm).model.model
    if rows.gate is None:
        return {}
    known = rows.gate._decisions.items()
    table = model.rows.branch_query
    return {name.rsplit("-", 1)[0]: table[index].tolist() for name, index in known}


@contextmanager
def watch_prefills(llm: LLM) -> Iterator[dict[str, dict[str, Any]]]:
    """Keep what the target computed in each single, whole-prompt prefill (V1 and V2)."""
    prefills: dict[str, dict[str, Any]] = {}
    proposer, runner = drafter(llm), model_runner(llm)
    propose = proposer.propose

    def keep(ids: list[str], token_ids: Any, hidden: Any, embeds: Any) -> None:
        length = len(token_ids)
        kept = {"hidden_LD": hidden[:length].clone(), "embeds_LD": embeds[:length].clone()}
        prefills.setdefault(ids[0].rsplit("-", 1)[0], {"token_ids": token_ids.tolist(), **kept})

    def v1(**kwargs: Any) -> Any:
        ids, tokens = runner.input_batch.req_ids, kwargs["target_token_ids"]
        keep(ids, tokens, kwargs["target_hidden_states"], runner.inputs_embeds.gpu)
        return propose(**kwargs)

    def v2(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if input_batch.req_ids:
            tokens = input_batch.input_ids[: input_batch.num_tokens]
            hidden = kwargs["last_hidden_states"] if len(args) < 3 else args[2]
            embeds = runner.model_state.encoder_runner.inputs_embeds
            keep(input_batch.req_ids, tokens, hidden, embeds)
        return propose(input_batch, *args, **kwargs)

    is_v1 = hasattr(proposer, "set_inputs_first_pass")
    with patch.object(proposer, "propose", v1 if is_v1 else v2):
        yield prefills


def torch_gaps(target: Path, draft: str, seen: dict[str, Any], cold: Cold) -> tuple[float, float]:
    """Return ``torch_gap`` and ``blind_gap`` of :class:`FirstLook`."""
    import torch
    from safetensors.torch import load_file

    from vllm_vispec.heads.folder import load_draft

    results, logits = cold
    config = json.loads((target / "config.json").read_text())
    image_id = config.get("image_token_id", config.get("image_token_index"))
    weights = load_file(target / "model.safetensors")
    lm_head = next(row for name, row in weights.items() if name.endswith("lm_head.weight"))
    reference, next_id = load_draft(draft), results["picture"][0].token_ids[0]
    runs = image_runs(seen["token_ids"], image_id)
    blind_LD = seen["embeds_LD"].clone()
    for start, end in runs:
        blind_LD[start:end] = 0
    row = len(seen["token_ids"]) - 1
    own_KV = torch.stack([logits["picture"][row, step] for step in range(STEPS)])
    gaps = []
    for embeds_LD in (seen["embeds_LD"], blind_LD):
        with torch.no_grad():
            given = seen | {"embeds_LD": embeds_LD}
            chain_KV = _chain(reference, given, next_id, runs, lm_head)
        gaps.append(float((own_KV - chain_KV).abs().max() / chain_KV.abs().max()))
    return gaps[0], gaps[1]


def _chain(
    draft: Any,
    seen: dict[str, Any],
    next_id: int,
    runs: list[tuple[int, int]],
    lm_head: torch.Tensor,
) -> torch.Tensor:
    """Return the logits [K, V] of the PyTorch draft, a head's or a draft VLM's."""
    import torch

    if draft.config.is_draft_vlm:
        state = draft.prefill(torch.tensor(seen["token_ids"]), seen["embeds_LD"], next_id, runs)
        own: torch.Tensor = draft.chain(state, STEPS).logits_SV
        return own
    next_embed_D = draft.embed_tokens.weight[next_id]
    state = draft.prefill(seen["embeds_LD"], next_embed_D, seen["hidden_LD"], runs)
    shared: torch.Tensor = draft.chain(state, STEPS, lm_head).logits_SV
    return shared


def image_runs(token_ids: list[int], image_id: int) -> list[tuple[int, int]]:
    """Return the maximal stretches of image tokens as [start, end)."""
    runs: list[tuple[int, int]] = []
    for index, token in enumerate(token_ids):
        if token != image_id:
            continue
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
