"""When the draft is left out altogether: the scheduler and the worker count the same steps."""

SLEEP_AFTER = 64
"""Steps with K = 0 in a row after which the draft's first pass is left out."""


class Sleep:
    """Counts steps with K = 0."""

    def __init__(self) -> None:
        self._idle = 0

    def saw(self, k: int | None, has_one_token_each: bool) -> bool:
        """Return whether the draft is left out of a step; to be called once for every step.

        Args:
            k: Draft tokens of the step; None: vLLM's own number.
            has_one_token_each: Whether all its requests have one token, as when decoding without
                drafts.
        """
        self._idle = self._idle + 1 if k == 0 else 0
        return self._idle > SLEEP_AFTER and has_one_token_each
