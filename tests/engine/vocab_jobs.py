"""Child-process job of the tests of a draft with a vocabulary of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.engine.static_jobs import Record
from tests.engine.workloads import Request, as_json, drive, mixed_requests, words
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    from vllm import LLM


def serve(
    kind: str, options: dict[str, Any], setups: dict[str, dict[str, Any] | None], count: int
) -> Iterator[dict[str, Any]]:
    """Serve the same requests with one engine per setup.

    Args:
        setups: name -> speculative config; None is plain decoding.
        count: greedy requests of every kind.

    Yields:
        Results by request, every token that was drafted, and what a captured graph could not do.
    """
    for name, speculative in setups.items():
        extra = {} if speculative is None else {"speculative_config": speculative}
        draft = None if speculative is None else speculative["model"]
        with engine.engine(engine.EngineOptions(**options, draft=draft, extra=extra)) as llm:
            drafted, record = (set(), Record()) if draft is None else watch(llm)
            results = drive(llm, mixed_requests(kind, count, 20))
            if draft is not None:
                drive(llm, sampled_requests())
            yield {
                "setup": name,
                "results": as_json(results),
                "drafted": sorted(drafted),
                "watched": sorted(record.passes),
                "violations": sorted(set(record.violations)),
                "lm_head_rows": _lm_head_rows(llm) if draft is not None else 0,
            }


def sampled_requests() -> list[Request]:
    """Requests at temperature 1, whose drafts may be sampled."""
    return [Request(f"sampled-{i}", words(i, 12), (), 12, {"temperature": 1.0}) for i in range(4)]


def watch(llm: LLM) -> tuple[set[int], Record]:
    """Note the drafted tokens and the operators of the draft's choice of them, from now on."""
    proposer, record = draft_logits.drafter(llm), Record()
    drafted: set[int] = set()
    propose, model = proposer.propose, proposer.model

    def noted(*args: Any, **kwargs: Any) -> Any:
        tokens = propose(*args, **kwargs)
        drafted.update(tokens.flatten().tolist())
        return tokens

    proposer.propose = noted
    for name in ("get_top_tokens", "compute_logits"):
        setattr(model, name, _watched(record, name, getattr(model, name)))
    return drafted, record


def _watched(record: Record, name: str, call: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record.watching(name):
            return call(*args, **kwargs)

    return wrapped


def _lm_head_rows(llm: LLM) -> int:
    return int(draft_logits.drafter(llm).model.lm_head.weight.shape[0])
