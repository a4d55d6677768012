"""Target families beyond the three that every test knows: one file, a few engines each.

Of each: outputs are plain vLLM's in a batch whose prompts are cut into chunks, hit cached prefixes
and are preempted, and where an image is cut in two; drafts are those of the head in PyTorch, behind
what training reads of the same model in transformers. V2's kernels are interpreted, so its batch is
small and hits no prefix.

One head brings its own embedding table, the other takes the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.comparison import TOLERANCE, serve_cold
from tests.support.engine import Engine, StartEngine, StartProcess
from tests.support.more_families import EXPERTS, RECURRENT, UNTRAINED, numbers_in_digits
from tests.support.runners import marks
from tests.support.tiny_store import UNCOMPRESSED, TinyStore
from tests.support.workloads import Request, assert_lossless, image_text, words
from vllm_vispec.data.encode import SEQUENCE_OUTPUTS, Encoded
from vllm_vispec.data.template import load_processor
from vllm_vispec.heads.families import families
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.train.target import TrainingTarget

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

HEADS: Mapping[str, Mapping[str, Any]] = {
    "vispec": {"checkpoint_format": "canonical"},
    "uncompressed": {**UNCOMPRESSED, "has_embed_tokens": False},
}
# Prompts and images are split, and requests preempt each other.
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 12}
# An image of Gemma 4 has 70 tokens at least.
LARGE = {"max_num_seqs": 8, "max_num_batched_tokens": 96, "num_blocks": 56, "max_model_len": 512}
# Llama 4 keeps layers of two kinds of attention apart: a request takes more blocks.
SIZES = {"gemma4": LARGE, "llama4": SMALL | {"num_blocks": 40}}
STEPS = 4
ELSEWHERE = ("qwen2_5_vl", "qwen3_vl", "llava_next", *RECURRENT)
"""Families that other tests serve on both runners."""
ALWAYS = ("qwen2_vl",)
"""Families of the default set; the others are slow."""
# What docs/targets.md says is what runs here. Those with experts need processes of their own.
ROWS = [
    pytest.param(runner, kind, id=f"{runner}-{kind}", marks=marks(runner, slow))
    for kind, tested in sorted(
        ((family.types[0], family.tested) for family in families()),
        key=lambda one: (one[0] in UNTRAINED, one[0] in EXPERTS),
    )
    if kind not in ELSEWHERE
    for runner, slow in (("v1", kind not in ALWAYS), ("v2", True))
    if runner.upper() in tested
]
TRAINED_ROWS = [row for row in ROWS if row.values[1] not in UNTRAINED]


@pytest.fixture
def start(engine: StartEngine, child: StartProcess, tiny: TinyStore) -> StartEngine:
    """Return ``start(runner, kind, head)``; without a head it is plain vLLM."""

    def make(runner: str, kind: str, head: str = "") -> Engine:
        # A dense model's engine leaves the process without the group that experts need.
        process = "experts" if kind in EXPERTS else ""
        if kind == "smolvlm":
            child(runner, process=process).call(numbers_in_digits)
        draft = {"draft": tiny.head(kind, **HEADS[head]), "num_draft_tokens": STEPS} if head else {}
        sizes = SIZES.get(kind, SMALL)
        return engine(runner, kind=kind, process=process, **draft, **sizes)

    return make


@pytest.mark.parametrize("head", list(HEADS))
# In the module's scope, so that a family's tests follow each other and its engines start once.
@pytest.mark.parametrize(("runner", "kind"), ROWS, scope="module")
def test_lossless(start: StartEngine, runner: str, kind: str, head: str) -> None:
    plain, speculative = start(runner, kind), start(runner, kind, head)
    size = {"count": 16, "max_tokens": 24} if runner == "v1" else {"count": 8, "max_tokens": 8}
    found = speculative.serve("mixed", **size)
    assert_lossless(plain.serve("mixed", **size), found)
    assert found.spy.preempted or runner == "v2"
    assert 0.1 < found.acceptance() < STEPS
    cut = speculative.serve("split")
    assert_lossless(plain.serve("split"), cut)
    assert cut.spy.split_images > 0
    if runner == "v1":
        again = speculative.serve("prefix")
        assert_lossless(plain.serve("prefix"), again)
        hits = any(one.num_cached_tokens for rows in again.results.values() for one in rows)
        # Beside this head, which keeps more for a token than Gemma 4's layers, nothing is hit.
        assert hits or (kind, head) == ("gemma4", "vispec")


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize(("runner", "kind"), TRAINED_ROWS, scope="module")
def test_drafts_are_the_reference(
    start: StartEngine, tiny: TinyStore, runner: str, kind: str, head: str
) -> None:
    image = image_text(kind, 1)
    requests = [
        Request("one", f"A user shows {image} . {words(1, 6)}", (1,), 4),
        Request("two", f"{words(2, 4)} {image} and {image} {words(3, 4)}", (2, 3), 4),
        Request("text", words(4, 12), (), 4),
    ]
    results, logits = start(runner, kind, head).once(serve_cold, requests)
    folder = tiny.target(kind)
    target = TrainingTarget.load(folder, torch.float32, "cpu")
    draft = load_draft(Path(tiny.head(kind, **HEADS[head])))
    for request in requests:
        (completion,) = results[request.name]
        sample = encoded(target, folder, request, completion.token_ids)
        length = len(sample.token_ids) - len(completion.token_ids)
        (observed,) = target.observe([sample])
        prefill = draft.prefill(
            observed.embeds_LD[:length],
            observed.embeds_LD[length],
            observed.hidden_LD[:length],
            sample.runs,
        )
        chain = draft.chain(prefill, STEPS, target.lm_head_VD, target.embed_VD)
        recorded = logits[request.name]
        for step in range(STEPS):
            found, wanted = recorded[length - 1, step], chain.logits_SV[step]
            gap = (found - wanted).abs().max() / wanted.abs().max()
            assert gap < 10 * TOLERANCE, (request.name, step, float(gap))


def encoded(
    target: TrainingTarget, folder: Path, request: Request, answer: Sequence[int]
) -> Encoded:
    """Return a request with its answer as training sees it."""
    prompt = request.prompt()
    images = prompt.get("multi_modal_data", {}).get("image")
    outputs = load_processor(folder)(text=[request.text], images=images, return_tensors="pt")
    ids = [*outputs["input_ids"][0].tolist(), *answer]
    return Encoded(
        request.name,
        "",
        torch.tensor(ids),
        torch.ones(len(ids), dtype=torch.bool),
        stretches(ids, target.image_token_id),
        {name: value for name, value in outputs.items() if name not in SEQUENCE_OUTPUTS},
    )


def stretches(ids: Sequence[int], token: int) -> tuple[tuple[int, int], ...]:
    """Return where ``token`` stands, [start, end) each."""
    found, start = [], 0
    for is_image, same in groupby(ids, lambda one: one == token):
        end = start + len(list(same))
        if is_image:
            found.append((start, end))
        start = end
    return tuple(found)
