"""How long prompts are, on the V2 runner.

Its batches say how many tokens a request was added with. After a preemption these are the prompt
and what was answered so far, so the prompt's own length is noted when a request is added.
"""

from collections.abc import Callable
from typing import Any

from vllm_vispec.compat.patching import patch

PROMPTS_PER_REQUEST = 8


class PromptLengths:
    """Prompt lengths by request id, of the requests that were added last.

    Args:
        max_num_requests: Most requests alive at once.
    """

    def __init__(self, max_num_requests: int) -> None:
        self._max_known = PROMPTS_PER_REQUEST * max_num_requests
        self._known: dict[str, int] = {}

    def get(self, request_id: str) -> int:
        """Return the request's prompt length, 0 if it was never added (dummy batches)."""
        return self._known.get(request_id, 0)

    def note(self, request_id: str, length: int) -> None:
        """Remember a request; one that is added again counts as new."""
        self._known.pop(request_id, None)
        if len(self._known) >= self._max_known:
            del self._known[next(iter(self._known))]
        self._known[request_id] = length

    def follow(self, model_state: Any) -> None:
        """Note every request that is added to this object from now on."""
        patch(model_state, "add_request", self._add_request)

    def _add_request(self, original: Callable[..., Any], req_index: int, new_req_data: Any) -> Any:
        self.note(new_req_data.req_id, new_req_data.prompt_len)
        return original(req_index, new_req_data)
