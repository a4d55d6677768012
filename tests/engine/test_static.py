"""What full CUDA graphs capture of the draft neither reads from the device nor changes shape.

The passes of the draft model are recorded operator by operator for two batches of the same size,
one of text, one with images. Left out is vLLM's own attention backend, which has its own code per
device. Host work of ours must lie outside the functions that vLLM captures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.drafts import DRAFTS
from tests.support.engine import StartEngine
from tests.support.operators import Record
from tests.support.runners import marks
from tests.support.spies import drafter
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, image_text, serve_requests, words

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

COUNT = 4
BATCHES = {
    name: [
        Request(f"{name}-{i}", f"{image_text(KIND, n)} {words(i, 9)}", tuple(range(i, i + n)), 19)
        for i, n in enumerate(counts)
    ]
    for name, counts in {"text": (0, 0, 0, 0), "images": (1, 2, 1, 2)}.items()
}
ROWS = [
    pytest.param(runner, head, id=f"{runner}-{head}", marks=marks(runner, slow))
    for runner, head, slow in (
        ("v1", "chain", False),
        ("v2", "chain", True),
        ("v2-overlay", "chain", False),
        ("v1", "no_compress", True),
        ("v1", "draft_vlm", True),
        ("v2", "draft_vlm", True),
        ("v2", "gated", True),
    )
]


@pytest.mark.parametrize(("runner", "head"), ROWS)
def test_static(engine: StartEngine, tiny: TinyStore, runner: str, head: str) -> None:
    ours = engine(runner, **DRAFTS[head].of(tiny), max_num_seqs=COUNT, name="static")
    passes, found = ours.run(_inspect)
    assert found == {"violations": [], "inside": [], "moved": []}
    for name in BATCHES:
        # Every pass over as many tokens runs the same operators on the same shapes. What happens
        # between passes lies outside the graphs, and is left out where nothing changes.
        assert {key: len(kinds) for key, kinds in passes[name].items() if len(kinds) > 1} == {}
    shared = set(passes["text"]) & set(passes["images"])
    # A draft pass and a full verification are among them.
    assert {f"pass {COUNT}", f"pass {6 * COUNT}"} <= shared
    for key in shared:
        assert passes["text"][key] == passes["images"][key], key


# What follows runs in the child.


def _inspect(llm: LLM) -> tuple[dict[str, dict[str, list[list[str]]]], dict[str, list[str]]]:
    """Serve both batches; return the operators of every pass by batch, and what is forbidden."""
    proposer, record = drafter(llm), Record()
    _instrument(proposer, record)
    rows = proposer.model.model.rows
    before = {name: buffer.data_ptr() for name, buffer in rows.named_buffers()}
    passes: dict[str, dict[str, list[list[str]]]] = {}
    for name, requests in BATCHES.items():
        record.passes = {}
        serve_requests(llm, requests)
        passes[name] = {
            key: sorted(map(list, set(map(tuple, ops))))
            for key, ops in record.passes.items()
            if key.startswith("pass ")
        }
    moved = [name for name, buffer in rows.named_buffers() if buffer.data_ptr() != before[name]]
    found = {"violations": record.violations, "inside": record.inside, "moved": moved}
    return passes, {key: sorted(set(names)) for key, names in found.items()}


def _instrument(proposer: Any, record: Record) -> None:
    """Record the draft model's passes and logits; note our host work in what V2 captures.

    V2 captures ``_prefill`` and the decode loop; filling rows and lookups must happen elsewhere.
    """
    model, rows, depth = proposer.model, proposer.draft_rows, [0]

    def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        call = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: around(call, *args, **kwargs))

    def watched(label: str) -> Callable[..., Any]:
        def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tensors = [v for v in (*args, *kwargs.values()) if hasattr(v, "shape")]
            with record.watching(f"{label} {tensors[0].shape[0] if tensors else ''}"):
                return call(*args, **kwargs)

        return around

    def captured(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            return call(*args, **kwargs)
        finally:
            depth[0] -= 1

    def noted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        record.inside += [call.__name__] if depth[0] else []
        return call(*args, **kwargs)

    for layer in model.model.layers:
        attention = layer.self_attn.attn
        attention.forward = record.pausing(attention.forward)
    wrap(model.model, "forward", watched("pass"))
    wrap(model, "compute_logits", watched("logits"))
    for name in ("_prefill", "_multi_step_decode", "_generate_draft"):
        if hasattr(proposer, name):
            wrap(proposer, name, captured)
    for owner, name in ((rows, "set_step"), (rows, "select_rows"), (rows.table, "slot_of")):
        wrap(owner, name, noted)
    wrap(rows, "select_rows", watched("move"))
