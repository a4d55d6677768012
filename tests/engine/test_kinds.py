"""Every kind of draft drafts what its PyTorch reference drafts, in every situation, losslessly.

ViSpec heads themselves are the business of the other files here. The gates of these random heads
are strong, so that requests differ in what they decide.

Tensor names end in their shape: L prompt tokens, D hidden, K draft steps, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.comparison import (
    TOLERANCE,
    Cold,
    assert_same_drafts,
    compare,
    deep_requests,
    serve_cold,
)
from tests.support.engine import StartEngine
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

    Attributes:
        head: Changes to a canonical head, or to a draft VLM.
        count: Mixed requests among those that are served.
    """

    head: Mapping[str, Any]
    model: str = "EagleViSpecForCausalLM"
    situations: str = "roomy-together roomy-prefix_hit chunks-chunked chunks-together"
    count: int = 8
    is_accepted: bool = True
    kind: str = KIND

    @property
    def compressor(self) -> str:
        """Its name and parts, or nothing."""
        return str(self.head.get("compressor", ""))


def _compressor(text: str, situations: str, global_feature: bool = False) -> Draft:
    head = {"num_query_tokens": 1, "compressor": text, "global_feature": global_feature}
    return Draft(head, situations=situations, count=1)


def _vlm(kind: str = KIND, is_accepted: bool = True, **head: Any) -> Draft:
    return Draft(head, VLM, "roomy-together roomy-prefix_hit chunks-chunked", 4, is_accepted, kind)


EMBEDS, VLM = "EagleViSpecEmbedsForCausalLM", "EagleDraftVlmForCausalLM"
TIGHT_SITUATIONS = "roomy-prefix_hit tight-chunked tight-together"
SELECT = "select(prune:2,pool:4,conv:3,resampler:2,text_only)"
NO_COMPRESS = {"num_query_tokens": 3, "compress": False}
# Wider than the target.
WIDE: Mapping[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DRAFTS: Mapping[str, Draft] = {
    "no_global": Draft({"num_query_tokens": 3, "global_feature": False}),
    "no_compress": Draft(NO_COMPRESS, EMBEDS),
    "neither": Draft(NO_COMPRESS | {"global_feature": False}, EMBEDS),
    # A vision tower with deepstack columns.
    "qwen3_vl": Draft(
        NO_COMPRESS, EMBEDS, "roomy-together chunks-together", count=4, kind="qwen3_vl"
    ),
    "resampler": _compressor("resampler:5", "roomy-together"),
    "text_only": _compressor("text_only", "roomy-together"),
    "msd": _compressor("identity", TIGHT_SITUATIONS),
    "concat": _compressor("concat(prune:4,pool:4,conv:3,resampler:2)", TIGHT_SITUATIONS, True),
    "weighted": _compressor("weighted(prune:3,pool:3,conv:3)", "roomy-together"),
    "select": _compressor(SELECT, TIGHT_SITUATIONS, True),
    "draft_vlm": _vlm(),
    "wide_vlm": _vlm(is_accepted=False, tie_word_embeddings=True, qkv_bias=False, **WIDE),
    "deep_vlm": _vlm("qwen3_vl", num_hidden_layers=1),
}
SLOW_ELSEWHERE = ("no_global", "no_compress", "neither", "draft_vlm", "select", "msd")
ROWS = [
    pytest.param(runner, name, id=f"{runner}-{name}", marks=marks(runner, slow))
    for runner, names in (("v1", DRAFTS), ("v2", SLOW_ELSEWHERE), ("v2-overlay", ("select",)))
    for name in names
    for slow in [runner == "v2" or (runner == "v1" and name != "draft_vlm")]
]


@pytest.mark.parametrize(("runner", "name"), ROWS)
def test_kind(engine: StartEngine, tiny: TinyStore, runner: str, name: str) -> None:
    draft = DRAFTS[name]
    kind = draft.kind
    if draft.model == VLM:
        head = tiny.draft_vlm(kind, **draft.head)
    else:
        head = tiny.head(kind, "canonical", **draft.head)
    options = {"draft": head, "num_draft_tokens": STEPS}
    plain_engine = engine(runner, kind, **ROOMY)
    requests: list[Request] = plain_engine.once(requests_of, kind, draft.count)
    plain: Results = plain_engine.once(drive_one_by_one, requests)
    first: FirstLook = engine(runner, kind, **options, **ROOMY).run(
        look, requests, str(tiny.target(kind)), head
    )
    _assert_sound(draft, plain, first)
    for situation in draft.situations.split():
        where, _, what = situation.partition("-")
        found = compare(
            first.cold, engine(runner, kind, **options, **ENGINES[where]), what, requests
        )
        assert_same_drafts(found)
        # The situation was what its name says.
        if what == "prefix_hit":
            assert sum(row.cached > 0 for row in found.requests.values()) >= 2
        elif where != "roomy":
            assert found.spy.split_images > 0
            assert bool(found.spy.preempted) == (situation == "tight-together")


def _assert_sound(draft: Draft, plain: Results, first: FirstLook) -> None:
    """Lossless, and drafting as in PyTorch; each image is encoded once."""
    assert first.model == draft.model
    for name, (found,) in first.cold[0].items():
        assert found.token_ids == plain[name][0].token_ids
    accepted = sum(sum(rows[0].per_step_accepted) for rows in first.cold[0].values())
    assert accepted > 0 or not draft.is_accepted
    assert first.torch_gap < TOLERANCE
    # A draft that sees nothing of images drafts as if they were blank, all others do not.
    assert (first.blind_gap > 100 * TOLERANCE) == (draft.compressor != "text_only")
    if draft.model == VLM:
        assert first.encoded[0] == first.encoded[1] > 0
    is_gated = draft.compressor.startswith(("weighted", "select"))
    assert bool(first.choices) == is_gated
    assert len({tuple(code) for code in first.choices.values()}) > 1 or not is_gated


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
    return [*requests, *deep_requests(kind)]


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
    from vllm_vispec.reference import merge_runs

    results, logits = cold
    config = json.loads((target / "config.json").read_text())
    image_id = config.get("image_token_id", config.get("image_token_index"))
    weights = load_file(target / "model.safetensors")
    lm_head = next(row for name, row in weights.items() if name.endswith("lm_head.weight"))
    reference, next_id = load_draft(draft), results["picture"][0].token_ids[0]
    places = [place for place, token in enumerate(seen["token_ids"]) if token == image_id]
    runs = merge_runs([(place, place + 1) for place in places], len(seen["token_ids"]))
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
        chain = draft.chain(state, STEPS)
    else:
        next_embed_D = draft.embed_tokens.weight[next_id]
        state = draft.prefill(seen["embeds_LD"], next_embed_D, seen["hidden_LD"], runs)
        chain = draft.chain(state, STEPS, lm_head)
    logits_KV: torch.Tensor = chain.logits_SV
    return logits_KV
