"""A draft with a vocabulary of its own: outputs are the target's, drafts are of that vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.engine import StartEngine
from tests.support.operators import Record
from tests.support.runners import runners
from tests.support.spies import drafter, watch_drafts
from tests.support.tiny_families import VOCAB
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, Served, mixed_requests, serve_requests, words
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_draft_tokens": 4}
FEW = [token for token in range(VOCAB) if token % 3]
SHUFFLED = [(token * 7) % VOCAB for token in range(VOCAB)]
REQUESTS = mixed_requests(KIND, 8, 20)
# At temperature 1 drafts may be sampled.
SAMPLED = [Request(f"sampled-{i}", words(i, 12), (), 12, {"temperature": 1.0}) for i in range(4)]


@dataclass(frozen=True)
class Drafted:
    """What an engine answered and drafted.

    Attributes:
        tokens: Every token that was drafted.
        watched: The methods that chose them; ``violations`` what a captured graph could not do.
    """

    served: Served
    tokens: set[int]
    watched: list[str]
    violations: list[str]
    lm_head_rows: int


def _configs(tiny: TinyStore, head: str) -> dict[str, dict[str, Any]]:
    """Return speculative settings by name; the head's folder gets a list of its own."""
    everything, few = tiny.root / "all.json", tiny.root / "few.json"
    everything.write_text(json.dumps(SHUFFLED))
    few.write_text(json.dumps({"token_ids": FEW}))
    write_vocab(Path(head) / DRAFT_VOCAB, SHUFFLED)
    return {
        "whole": {},
        "all": {"draft_vocab": str(everything)},
        "few": {"draft_vocab": str(few)},
        "first": {"draft_vocab": 200},
        "logits": {"draft_vocab": str(few), "draft_sample_method": "probabilistic"},
    }


@pytest.mark.parametrize("runner", runners("v1", "v2", "v1-overlay", slow=["v2"]))
def test_draft_vocab(engine: StartEngine, tiny: TinyStore, runner: str) -> None:
    # A head of its own: a list in the folder of others' would be theirs, too.
    head = tiny.head(seed=77)
    configs = _configs(tiny, head)
    if runner == "v2":
        # Triton's interpreter refuses a mask in vLLM's kernel that samples drafts.
        del configs["logits"]
    plain = engine(runner, **OPTIONS).once(serve_requests, REQUESTS)
    found: dict[str, Drafted] = {
        name: engine(runner, **OPTIONS, draft=head, config=config).run(_serve)
        for name, config in configs.items()
    }
    for name, drafted in found.items():
        assert drafted.served.outputs() == plain.outputs(), name
        assert drafted.served.acceptance() > 0, name
    whole, few, first = found["whole"], found["few"], found["first"]
    # A list of all tokens changes no draft, fewer are accepted less often.
    assert found["all"].served.accepted() == whole.served.accepted()
    assert found["all"].tokens
    assert few.served.acceptance() < 0.8 * whole.served.acceptance()
    # Only tokens of the list are drafted.
    assert not whole.tokens <= set(FEW)
    assert few.tokens <= set(FEW)
    assert first.tokens <= set(SHUFFLED[:200])
    # The lm_head is as small as the list, up to vLLM's padding of 64 rows.
    assert whole.lm_head_rows >= VOCAB
    assert len(FEW) <= few.lm_head_rows < len(FEW) + 64
    assert first.lm_head_rows == 256
    # The choice reads nothing back; logits are scattered only where drafts are sampled.
    assert few.watched == ["get_top_tokens"]
    assert few.violations == []
    if "logits" in found:
        assert found["logits"].tokens <= set(FEW)
        assert "compute_logits" in found["logits"].watched
        assert found["logits"].violations == []


def _serve(llm: LLM) -> Drafted:
    """Serve and note the drafted tokens and the operators of the draft's choice of them."""
    record, model = Record(), drafter(llm).model

    def watched(name: str, call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record.watching(name):
                return call(*args, **kwargs)

        return wrapped

    for name in ("get_top_tokens", "compute_logits"):
        setattr(model, name, watched(name, getattr(model, name)))
    with watch_drafts(llm) as drafts:
        served = serve_requests(llm, REQUESTS)
        serve_requests(llm, SAMPLED)
    tokens = {token for step in drafts for row in step for token in row}
    rows = int(model.lm_head.weight.shape[0])
    return Drafted(served, tokens, sorted(record.passes), sorted(set(record.violations)), rows)
