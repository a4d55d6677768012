"""Requests whose sampling depends on the path, for which a flat row of nodes would be wrong.

vLLM counts the tokens before a row of logits by its place: penalties, forbidden words, least
lengths, thinking budgets and grammars.  In a chain place and path agree, so these requests get one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_KNOWN = 4096


def needs_chain(params: Any) -> bool:
    """Whether a request with these `SamplingParams` cannot have a tree."""
    if params is None:
        return False
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty not in (None, 1.0)
        or params.bad_words
        or params.min_tokens
        or params.structured_outputs is not None
        or getattr(params, "thinking_token_budget", None) is not None
    )


class ChainRequests:
    """Remembers which requests need a chain."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def flags(self, request_ids: Sequence[str], params: Mapping[str, Any]) -> list[bool]:
        """Return for each request of a batch whether it needs a chain.

        Args:
            request_ids: The batch.
            params: Sampling parameters of the requests not seen before, by id.
        """
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        for request_id in request_ids:
            if request_id not in self._known:
                self._known[request_id] = needs_chain(params[request_id])
        return [self._known[request_id] for request_id in request_ids]
