"""With a draft of any kind, greedy decoding gives what plain vLLM gives with the same settings.

A row of the tables is a runner, an engine without and with a draft, and a scenario that both serve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.support.child import ChildError
from tests.support.drafts import DRAFTS, Draft, tree
from tests.support.engine import StartEngine
from tests.support.runners import marks, runners
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_store import GATED, KIND, UNCOMPRESSED, TinyStore
from tests.support.workloads import Served, assert_lossless, assert_same_logprobs, serve
from vllm_vispec.trees.grow import TreeGrower

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

Options = dict[str, Any]

# Random models would fill their JSON with blanks.
GRAMMARS = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
# Most images are split, and requests wait for their turn.
SMALL: Options = {"max_num_batched_tokens": 48, **GRAMMARS}
# 9 usable blocks of 32 tokens: requests preempt each other.
BLOCKS: Options = SMALL | {"max_num_batched_tokens": 96, "num_blocks": 10}
COMPILED = {"compiler": "eager"}
BASES: Mapping[str, Options] = {
    "small": SMALL,
    "blocks": BLOCKS,
    "compiled": SMALL | COMPILED,
    "compiled blocks": BLOCKS | COMPILED,
    **{kind: {"kind": kind, "max_num_seqs": 8, "max_num_batched_tokens": 64} for kind in FAMILIES},
}


def _compressor(text: str, global_feature: bool = False) -> Draft:
    changes = {"num_query_tokens": 1, "compressor": text, "global_feature": global_feature}
    return Draft({"checkpoint_format": "canonical", **changes})


def _trees(*, head: Mapping[str, Any] | None = None, few_tokens: bool = False, **how: Any) -> Draft:
    return Draft(head or {}, tree(**{"nodes": 19, "top_k": 3, **how}), few_tokens=few_tokens)


CONFIDENT: Options = {"policy": "spec_llava", "threshold": 0.1}
LOAD = {"num_speculative_tokens_per_batch_size": [[1, 2, 19], [3, 6, 7], [7, 10, 2], [11, 16, 0]]}
# A head whose drafts are unsure often enough that paths of every length occur.
UNSURE: Options = {"head": {"seed": 2}, "policy": "spec_llava", "threshold": 0.9999}
SELECT = "select(prune:2,pool:4,conv:3,resampler:2,text_only)"
COMPRESSORS = {
    "prune": _compressor("prune:3"),
    "pool": _compressor("pool:4"),
    "conv": _compressor("conv:3"),
    "resampler": _compressor("resampler:5"),
    "text_only": _compressor("text_only"),
    "concat": _compressor("concat(prune:4,pool:4,conv:3,resampler:2)"),
    "weighted": _compressor("weighted(prune:3,pool:3,conv:3)"),
    "select": _compressor(SELECT),
    "prune+global": _compressor("prune:3", True),
    # The one whose state is the most there is.
    "select+global": _compressor(SELECT, True),
}
TREES = {
    "tree-embeds": _trees(head=UNCOMPRESSED),
    "tree-gated": _trees(head=GATED),
    "tree-tokens": _trees(few_tokens=True),
    "tree-spec_llava": _trees(**CONFIDENT),
    "tree-path": _trees(nodes=6, depth=5, **{**UNSURE, "top_k": 1}),
    "tree-entropy": _trees(policy="entropy", depth=5),
    "tree-load": _trees(config=LOAD),
    "tree-paths": _trees(config=LOAD, **UNSURE),
    # More slots are drafted into than there are nodes.
    "tree-few": _trees(nodes=5),
    "tree-shallow": _trees(nodes=12, depth=1),
}
FOUR = {"num_draft_tokens": 4}
ALL_DRAFTS: Mapping[str, Draft] = {
    **DRAFTS,
    "q1": Draft({"num_query_tokens": 1}),
    "q4": Draft({"num_query_tokens": 4}),
    # Three images and two slots: evicted rows cost acceptance at most.
    "evicting": Draft(options={"config": {"image_table_size": 2}}),
    "tree": _trees(),
    "draft_vlm": Draft(options=FOUR, is_vlm=True),
    "draft_vlm-tree": Draft(options=tree(19, top_k=3), is_vlm=True),
    "draft_model": Draft(options=FOUR, is_sibling=True),
    "draft_model-text": Draft(options=FOUR, is_text_model=True),
    **{
        f"draft_model-{images.partition(':')[0]}": Draft(
            options={**FOUR, "config": {"images": images}}, is_sibling=True
        )
        for images in ("none", "prune:4", "pool:4")
    },
    "draft_model-tree": Draft(options=tree(19, top_k=3), is_sibling=True),
    "draft_model-load": Draft(options=tree(19, LOAD, top_k=3), is_sibling=True),
    "draft_model-prune-tree": Draft(
        options=tree(19, top_k=3, config={"images": "prune:4"}), is_sibling=True
    ),
    "draft_model-path": Draft(
        options=tree(6, depth=5, policy="spec_llava", top_k=1, threshold=0.1), is_sibling=True
    ),
    "draft_vlm-tokens": Draft(options=FOUR, is_vlm=True, few_tokens=True),
    **COMPRESSORS,
    **TREES,
}


def _rows(
    runner: str, base: str, drafts: str, scenarios: Mapping[str, Options], slow: bool = False
) -> list[Any]:
    """Return a parameter for each of ``drafts`` and ``scenarios``.

    A draft followed by "~" is served with asynchronous scheduling, two steps in flight.
    """
    return [
        pytest.param(
            (runner, base, draft, scenario, kwargs),
            id=f"{runner}-{base}-{draft}-{scenario}{kwargs.get('count', '')}",
            marks=marks(runner, slow),
        )
        for draft in drafts.split()
        for scenario, kwargs in scenarios.items()
    ]


def _mixed(count: int, max_tokens: int = 14) -> Mapping[str, Options]:
    return {"mixed": {"count": count, "max_tokens": max_tokens}}


PREFIX: Mapping[str, Options] = {"prefix": {}}
# The rest of what V1 serves. V2 runs in Triton's interpreter, which refuses vLLM's kernels of top_p
# ("n") and grammars.
REST: Mapping[str, Options] = {"abort": {}, "features": {}, "edge": {}}
V2_FEATURES: Mapping[str, Options] = {
    "features": {"names": ["stop", "logprobs", "penalty", "words"]}
}
FULL = {**_mixed(64), **PREFIX, **REST}

ROWS = [
    *_rows("v1", "small", "chain tree", FULL),
    *_rows("v1", "small", "chain~ tree~", {**_mixed(32), **PREFIX}),
    *_rows("v1", "small", "chain~", {"abort": {}}, slow=True),
    *_rows("v1", "small", "tree~", REST, slow=True),
    *_rows("v1", "small", "evicting", _mixed(32)),
    *_rows("v1", "small", "q1 q4", _mixed(32)),
    *_rows("v1", "blocks", "chain tree", _mixed(20, 40)),
    *_rows("v1", "blocks", "chain~ tree~", _mixed(20, 40), slow=True),
    *_rows("v1", "compiled", "chain", FULL, slow=True),
    *_rows("v1", "compiled blocks", "chain", _mixed(20, 40), slow=True),
    *_rows("v2", "small", "chain", {**_mixed(16, 6), **PREFIX}),
    *_rows("v2", "small", "chain~", _mixed(16, 6)),
    *_rows("v2", "small", "chain chain~", _mixed(32, 6), slow=True),
    *_rows("v2", "blocks", "chain", _mixed(10, 40), slow=True),
    *_rows("v2", "small", "tree", {**_mixed(12, 6), **PREFIX, **V2_FEATURES}, slow=True),
    *_rows("v2", "small", "tree~", _mixed(12, 6), slow=True),
    *_rows("v2", "blocks", "tree", _mixed(8, 40), slow=True),
    *_rows("v2", "small", "tree-path", {**PREFIX, **V2_FEATURES, "edge": {}}, slow=True),
    *_rows("v2", "small", "tree-paths", _mixed(12, 6), slow=True),
    *_rows("v2", "blocks", "tree-path~", _mixed(8, 40), slow=True),
    *_rows("v2-overlay", "small", "tree-path", _mixed(12, 6)),
    *_rows("v1-overlay", "small", "chain", {**_mixed(64, 6), **PREFIX}),
    *_rows("v1-overlay", "small", "chain~", _mixed(64, 6)),
    *_rows("v1-overlay", "blocks", "chain", _mixed(10, 40)),
    *_rows("v1-overlay", "small", "tree", {**_mixed(16), **PREFIX, **REST}),
    *_rows("v1-overlay", "small", "tree~", _mixed(16)),
    *_rows("v1-overlay", "blocks", "tree", _mixed(8, 40)),
    *_rows("v2-overlay", "small", "chain", {**_mixed(24, 6), **PREFIX}),
    *_rows("v2-overlay", "small", "chain~", _mixed(24, 6)),
    *_rows("v2-overlay", "blocks", "chain", _mixed(10, 40)),
    *_rows("v2-overlay", "small", "tree", {**_mixed(12, 6), **PREFIX, "edge": {}}),
    *_rows("v2-overlay", "small", "tree~", _mixed(12, 6)),
    *_rows("v1", "small", " ".join(COMPRESSORS), {**_mixed(16), **PREFIX}, slow=True),
    *_rows("v1", "small", "select+global", REST, slow=True),
    *_rows("v1", "blocks", "select+global", _mixed(20, 40), slow=True),
    *_rows("v1", "small", " ".join(TREES), _mixed(32), slow=True),
    *_rows("v1", "small", "tree-few tree-load tree-path", {"edge": {}}, slow=True),
    *_rows("v1", "small", "tree-path", {**PREFIX, "features": {}}, slow=True),
    *_rows("v1", "small", "draft_model draft_model-tree", {**_mixed(64), **PREFIX}),
    *_rows("v1", "small", "draft_model-tree", REST, slow=True),
    *_rows("v1", "small", "draft_model-path draft_model-load", _mixed(32), slow=True),
    *_rows("v1", "small", "draft_model-text draft_model-prune-tree", {**_mixed(32), **PREFIX}),
    *_rows("v1", "small", "draft_model-none draft_model-prune draft_model-pool", PREFIX, slow=True),
    *_rows("v2", "small", "draft_model-text draft_model-none", _mixed(12, 6), slow=True),
    *_rows("v2", "small", "draft_model-pool draft_model-prune-tree", PREFIX, slow=True),
    *_rows("v1", "small", "draft_model~", {**_mixed(64), **PREFIX}, slow=True),
    *_rows("v1", "blocks", "draft_model draft_model-tree", _mixed(16, 40), slow=True),
    *_rows("v1", "compiled", "draft_model", _mixed(16), slow=True),
    *_rows("v2", "small", "draft_model draft_model-tree", {**_mixed(12, 6), **PREFIX}, slow=True),
    *_rows("v2", "small", "draft_model-load", _mixed(12, 6), slow=True),
    *_rows("v2", "blocks", "draft_model", _mixed(8, 40), slow=True),
    *_rows("v1-overlay", "small", "draft_model draft_model-tree", {**_mixed(16), **PREFIX}),
    *_rows("v2-overlay", "small", "draft_model~ draft_model-tree~", {**_mixed(12, 6), **PREFIX}),
    *_rows("v1", "small", "draft_vlm draft_vlm-tree~", {**_mixed(24), **PREFIX}, slow=True),
    *_rows("v1", "small", "draft_vlm-tokens", _mixed(24), slow=True),
    *_rows("v1", "blocks", "draft_vlm~ draft_vlm-tree", _mixed(16, 40), slow=True),
    *_rows("v2", "small", "draft_vlm draft_vlm-tree~", {**_mixed(12, 6), **PREFIX}, slow=True),
    *_rows("v2-overlay", "small", "draft_vlm draft_vlm-tree~", {**_mixed(12, 6), **PREFIX}),
    *(row for kind in FAMILIES for row in _rows("v1", kind, "chain", _mixed(16, 16))),
    *(
        row
        for kind in ("qwen2_5_vl", "qwen3_vl")
        for runner in ("v2", "v1-overlay")
        for row in _rows(runner, kind, "chain", _mixed(8, 16), slow=runner == "v2")
    ),
]
LEAST_SPLITS = {64: 10, 32: 5, 24: 5, 16: 3, 12: 1}
"""Images that the small token budget splits, by the number of mixed requests."""


def _serve(
    engine: StartEngine, tiny: TinyStore, runner: str, base: str, draft: str, *scenario: Any
) -> Served:
    options = BASES[base]
    name = draft.rstrip("~")
    drafting = ALL_DRAFTS[name].of(tiny, options.get("kind", KIND)) if name else {}
    asynchronous = {"async_scheduling": True} if draft.endswith("~") else {}
    return engine(runner, **{**options, **drafting, **asynchronous}).serve(
        scenario[0], **scenario[1]
    )


@pytest.mark.parametrize("row", ROWS)
def test_lossless(
    engine: StartEngine, tiny: TinyStore, row: tuple[str, str, str, str, Options]
) -> None:
    runner, base, draft, scenario, kwargs = row
    plain = _serve(engine, tiny, runner, base, "", scenario, kwargs)
    found = _serve(engine, tiny, runner, base, draft, scenario, kwargs)
    assert_lossless(plain, found)
    assert (found.spy.in_flight == 2) == draft.endswith("~")
    if scenario in ("mixed", "prefix"):
        assert 0.1 < found.acceptance() < 5
        assert len(found.results) == kwargs.get("count", 11)
    if found.table and draft != "evicting" and "blocks" not in base:
        assert found.table["misses"] == 0
    if not draft.endswith("~"):
        _assert_arranged(runner, base, scenario, kwargs, plain, found)


def _assert_arranged(
    runner: str, base: str, scenario: str, kwargs: Options, plain: Served, found: Served
) -> None:
    """The requests ran into what the scenario is for.

    They were arranged for 0.32; 0.33 hashes blocks one token further on, so its prefix hits end
    elsewhere. There it is enough that there were hits.
    """
    if scenario == "prefix":
        assert any(one.num_cached_tokens for rows in found.results.values() for one in rows)
        assert found.spy.hits_inside_image > 0 or "overlay" in runner
    elif scenario == "features":
        _assert_features(plain, found)
    elif scenario == "edge":
        for name, (sequence,) in found.results.items():
            assert len(sequence.token_ids) == int(name.split("-")[1])
            assert sequence.finish_reason == "length"
    elif "blocks" in base:
        assert found.spy.preempted
    elif base in FAMILIES:
        assert found.table["computed"] > 0
    elif scenario == "mixed" and "overlay" not in runner:
        assert found.spy.split_images >= LEAST_SPLITS[kwargs["count"]]


def _assert_features(plain: Served, found: Served) -> None:
    """Log probabilities agree; the grammar shaped the text, stop strings ended it, ``n`` is 3."""
    assert_same_logprobs(plain, found, 48)
    assert all(found.results[f"stop-{i}"][0].finish_reason == "stop" for i in range(3))
    for i in range(3):
        if "json-0" in found.results:
            parsed = json.loads(found.results[f"json-{i}"][0].text)
            assert set(parsed) == {"color", "count", "solid"}
            assert len(found.results[f"n-{i}"]) == 3


def test_a_table_smaller_than_a_request(engine: StartEngine, tiny: TinyStore) -> None:
    found = _of_v1(engine, tiny, "evicting")
    assert found.table["evicted"] > 0


def _of_v1(
    engine: StartEngine, tiny: TinyStore, draft: str, scenario: str = "mixed", count: int = 32
) -> Served:
    kwargs = {"count": count, "max_tokens": 14} if scenario == "mixed" else {}
    return _serve(engine, tiny, "v1", "small", draft, scenario, kwargs)


@pytest.mark.slow
def test_steps_are_as_large_as_they_should_be(engine: StartEngine, tiny: TinyStore) -> None:
    """Paths end where the draft is unsure, load shrinks trees to chains, depth bounds acceptance.

    Near the longest sequence as many nodes as fit are verified.
    """
    names = ("path", "paths", "load", "shallow", "embeds")
    steps = {name: _of_v1(engine, tiny, f"tree-{name}").steps() for name in names}
    drafted = {name: {count for count, _ in found} for name, found in steps.items()}
    assert drafted["path"] >= {1, 2, 3, 6}
    assert drafted["paths"] >= {1, 2, 4}
    assert drafted["load"] >= {2, 7, 19}
    for name in ("path", "load"):
        # Two of them are a chain, and count.
        assert max(accepted for count, accepted in steps[name] if count == 2) == 2
    assert max(accepted for _, accepted in steps["shallow"]) == 2
    assert max(accepted for _, accepted in steps["embeds"]) > 2
    for name in ("few", "load", "path"):
        near_the_end = _of_v1(engine, tiny, f"tree-{name}", "edge").steps()
        assert {count for count, _ in near_the_end} >= {1, 2, 3}
        assert sum(accepted for _, accepted in near_the_end) > 0


@pytest.mark.slow
def test_a_draft_vlm_drafts_from_some_tokens(engine: StartEngine, tiny: TinyStore) -> None:
    """Rows of its own lm_head, not of the target's."""
    whole, some = (
        _of_v1(engine, tiny, draft, count=24) for draft in ("draft_vlm", "draft_vlm-tokens")
    )
    assert some.acceptance() < whole.acceptance()


NO_IMAGES: Mapping[str, Options] = {
    "v1": {"limit_mm_per_prompt": {"image": 0, "video": 0}},
    "v2": {"language_model_only": True},
}
TEXT_ONLY = [
    pytest.param(runner, draft, id=f"{runner}-{draft}", marks=marks(runner, slow))
    for runner, drafts, slow in (
        ("v2", "chain tree", False),
        ("v2-overlay", "chain tree", False),
        ("v1", "chain tree draft_vlm no_compress gated", True),
        ("v2", "draft_vlm no_compress gated", True),
    )
    for draft in drafts.split()
]


@pytest.mark.parametrize(("runner", "draft"), TEXT_ONLY)
def test_text_only(engine: StartEngine, tiny: TinyStore, runner: str, draft: str) -> None:
    """A VLM started for text only, without vision tower and encoder cache.

    As many drafts are accepted as in an engine that takes images and is asked the same.
    """
    base = BASES[KIND]
    drafting = ALL_DRAFTS[draft].of(tiny)
    # Without a vision tower vLLM caches rotary tables that hold nothing, for all of the process.
    no_images: Options = {**NO_IMAGES[runner[:2]], "process": "text only"}
    plain = engine(runner, **base, **no_images).serve("text")
    found = engine(runner, **base, **drafting, **no_images).serve("text")
    assert_lossless(plain, found)
    assert found.accepted() == engine(runner, **base, **drafting).serve("text").accepted()


@pytest.mark.parametrize("runner", runners("v1", "v2", "v1-overlay", slow=["v2"]))
def test_fp8_cache(engine: StartEngine, tiny: TinyStore, runner: str) -> None:
    """Chains answer as plain vLLM with an fp8 cache does.

    Images are masked as with an exact cache: a draft that saw them would be refused more often.
    """
    head = tiny.head(checkpoint_format="canonical")

    def cached_as(dtype: str, **draft: Any) -> Served:
        options = {"max_model_len": 512, "kv_cache_dtype": dtype, **draft}
        return engine(runner, **options).serve("mixed", count=16)

    if not torch.cpu._is_avx512_supported():
        with pytest.raises(ChildError, match=r"AVX-512|not supported by the CPU attention"):
            cached_as("fp8")
        return
    drafting = {"draft": head, "num_draft_tokens": 4}
    plain, chain, exact = (
        cached_as("fp8"),
        cached_as("fp8", **drafting),
        cached_as("auto", **drafting),
    )
    assert_lossless(plain, chain)
    counts = [sum(accepted for _, accepted in served.steps()) for served in (chain, exact)]
    assert counts[0] > 0.85 * counts[1]


@pytest.mark.parametrize("runner", runners("v1", "v2", "v2-overlay", slow=["v1"]))
@pytest.mark.parametrize("scenario", ["mixed", "short"])
def test_trees_after_a_memory_profile(
    engine: StartEngine, tiny: TinyStore, scenario: str, runner: str
) -> None:
    """Trees start as GPUs start them, before keys and values have a place, with little room.

    The budget has room for a level of 8 trees: in a step of 12 prompts four requests get none.
    """
    options = {"max_num_seqs": 12, "max_num_batched_tokens": 32, "memory_profile": True}
    tree = _trees(top_k=4).of(tiny)
    kwargs = {"count": 6, "max_tokens": 6} if scenario == "mixed" else {}
    plain = engine(runner, **options).serve(scenario, **kwargs)
    drafting = engine(runner, **options, **tree)
    assert_lossless(plain, drafting.serve(scenario, **kwargs))
    if scenario == "mixed":
        assert drafting.serve(scenario, **kwargs).acceptance() > 0.2
    else:
        assert drafting.run(_most_trees, KIND) == 8


def _most_trees(llm: Any, kind: str) -> int:
    """Return of how many requests trees were grown in one step, at most."""
    with patch.object(
        TreeGrower, "start_trees", autospec=True, side_effect=TreeGrower.start_trees
    ) as grown:
        serve(llm, "short", kind)
    return max(len(call.args[1]) for call in grown.call_args_list)
