"""Targets with recurrent layers: refused draft tokens leave no trace in their state.

vLLM's CPU kernels of gated delta nets compute in bf16 alone, and sum in another order for several
tokens than for one. So answers may part from plain vLLM's where its two best tokens are nearly
level, and nowhere else.

- V1 keeps states without prefix caching: vLLM caches them with a Triton kernel, for which its CPU
  build has nothing else on V1.
- V2 caches states at the ends of blocks ("align"): prefix hits, preemption, rejected tokens across
  the end of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.engine import StartEngine, StartProcess
from tests.support.more_families import RECURRENT
from tests.support.runners import marks
from tests.support.tiny_store import UNCOMPRESSED, TinyStore
from tests.support.workloads import Request, Served, image_text, words
from vllm_vispec.heads.families import find_family

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

# As many bytes a token as the target's layers of attention: vLLM pads the pages of all layers to
# the largest.
NARROW = {"num_key_value_heads": 1}
HEADS: Mapping[str, Mapping[str, Any]] = {"vispec": NARROW, "uncompressed": UNCOMPRESSED | NARROW}
BASE = {"dtype": "bfloat16", "max_num_seqs": 6, "max_num_batched_tokens": 96}
RUNNERS: Mapping[str, Mapping[str, Any]] = {
    "v1": {"enable_prefix_caching": False, "max_model_len": 512, "num_blocks": 80},
    "v2": {"max_model_len": 1024, "num_blocks": 200},
}
STEPS = 4
NEAR = 0.2
"""By how much (nats) the best token may lead where answers part."""
ROWS = [
    pytest.param(runner, kind, head, id=f"{runner}-{kind}-{head}", marks=marks(runner, slow=True))
    for runner, kind, head in (
        *(("v1", kind, head) for kind in RECURRENT for head in HEADS),
        *(("v2", "qwen3_5", head) for head in HEADS),
    )
    if (family := find_family(kind)) is not None and family.tested
]


@pytest.mark.parametrize(("runner", "kind", "head"), ROWS)
def test_states_follow_accepted_tokens(
    engine: StartEngine, child: StartProcess, tiny: TinyStore, runner: str, kind: str, head: str
) -> None:
    # A dense model's engine leaves the process without the group that experts need.
    process = f"recurrent {kind}"
    child(runner, process=process).call(no_interpreted_positions)
    turns = long_turns(kind) if runner == "v2" else [requests(kind, 6, 150, 24)]
    options = {**BASE, **RUNNERS[runner], "kind": kind, "process": process}
    draft = tiny.head(kind, **HEADS[head])
    drafting = engine(runner, draft=draft, num_draft_tokens=STEPS, **options)
    assert drafting.run(kept_states) == {("align" if runner == "v2" else "none", STEPS)}
    found: Served = drafting.serve("turns", batches=turns)
    assert_same_but_near(engine(runner, **options).serve("turns", batches=turns), found)
    assert 0.1 < found.acceptance() < STEPS
    assert found.table["misses"] == 0
    if runner == "v2":
        hits = any(one.num_cached_tokens for rows in found.results.values() for one in rows)
        # The other head has other pages, and prompts of this length hit none of the blocks.
        assert hits or head == "uncompressed"


def requests(kind: str, count: int, length: int, max_tokens: int) -> list[Request]:
    """Return requests about one image that reach over the end of a block."""
    text = f"{words(1, 40)} {image_text(kind, 1)} {words(2, length)}"
    return [
        Request(f"{i}", f"{text} {words(i, 4 + 3 * i)}", (1,), max_tokens, {"logprobs": 2})
        for i in range(count)
    ]


def long_turns(kind: str) -> list[list[Request]]:
    """Return two turns with two blocks in common."""
    asked = requests(kind, 2, 420, 8)
    return [asked, [replace(one, name=f"again-{one.name}") for one in asked]]


def assert_same_but_near(plain: Served, found: Served) -> None:
    """Most answers are the same, the others part where plain vLLM's two best are nearly level."""
    parted = 0
    for name, (expected,) in plain.results.items():
        ids, others = expected.token_ids, found.results[name][0].token_ids
        assert len(ids) == len(others)
        step = next(
            (i for i, pair in enumerate(zip(ids, others, strict=True)) if len({*pair}) > 1), None
        )
        if step is not None:
            parted += 1
            best = expected.logprobs[step]
            assert best[ids[step]] - best.get(others[step], float("-inf")) < NEAR, (name, step)
    assert parted <= len(plain.results) / 3


# What follows runs in the child.


def no_interpreted_positions() -> None:
    """Interpolate the tower's positions in PyTorch: interpreted kernels return NaN in bf16."""
    from vllm.model_executor.models import qwen3_vl

    qwen3_vl.HAS_TRITON = False


def kept_states(llm: LLM) -> set[tuple[str, int]]:
    """Return how states are cached, and for how many draft tokens each keeps one."""
    from vllm.v1.kv_cache_interface import MambaSpec

    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    return {
        (spec.mamba_cache_mode, spec.num_speculative_blocks)
        for spec in specs
        if isinstance(spec, MambaSpec)
    }
