"""Chooses K, the number of draft tokens a step, by what drafts have been worth so far.

A state of counts and step times, without vLLM in it. A step in which every request has K draft
tokens brings ``gain(K)`` tokens a request and takes ``cost(K)`` times as long as one without. The K
with the largest ``gain / cost`` is chosen, 0 where no K is worth its cost.

* ``gain`` is 1 plus the expected accepted tokens: the chances, position by position, that a draft
  token is accepted if those before it were. Old drafts count less and less.
* ``cost`` is measured for each size of batch (powers of two). Every draft token adds one pass of
  the draft and one row to verify, so times grow along a line in K. Where it meets K = 0 is the time
  of a step without drafts. Until two K have been timed, a guess stands for the cost.

Now and then another K is tried for a few steps, so that its time stays known. While K is 0, drafts
are probed again: after a pause that doubles as long as they fail.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from statistics import median
from typing import Any

from vllm_vispec.utils.errors import ViSpecError

SCHEDULE = "num_speculative_tokens_per_batch_size"
GUESSED_COST = 0.06
"""What a draft token adds to a step's time until it is measured, as a share of a plain step's."""
LEAST_GAIN = 1.05
"""Fewer tokens a step never pay for their drafts, whatever was measured."""
MARGIN = 1.03
"""How much better another K has to look before it is taken."""

_WINDOW = 128
"""Tokens tried at a position after which older ones count half."""
_KEPT_AT_PROBE = 8
_PRIOR = 1.6, 2.0
"""Accepted and tried tokens that every position begins with."""
_TIMES = 9
_ENOUGH_TIMES = 3
_TRIAL_STEPS = 8
_FIRST_PAUSE, _PAUSE = 8, 256
"""Steps between two trials at one load: the first is twice as long, each later one doubles."""
_PROBE_DRAFTS, _PROBE_STEPS = 24, 32
_LEAST_WAIT, _MOST_WAIT = 512, 8192
_SETTLED = 64
"""Steps with one K before the log says so."""
SLEEP_AFTER = 64
"""Steps with K = 0 in a row after which the draft's first pass is left out."""


def ladder(most: int) -> list[int]:
    """Return the K to choose from, largest first: halves down to 1, and 0."""
    found = [most]
    while found[-1]:
        found.append(found[-1] // 2)
    return found


def ladder_schedule(most: int) -> list[list[int]]:
    """Return a load schedule that makes vLLM record CUDA graphs for every K of the ladder.

    vLLM reads K off it by the number of requests; our scheduler chooses otherwise. An engine with
    room for fewer requests records the first of them only: all, none, then what lies between.
    """
    steps = ladder(most)
    return [[n, n, k] for n, k in enumerate([steps[0], 0, *steps[1:-1]], start=1)]


def resolve_adaptive(
    adaptive: bool | None, settings: dict[str, Any], args: Any, parallel: Any, *, has_tree: bool
) -> bool:
    """Return whether K follows load and acceptance; if so, let vLLM record graphs for every K.

    Args:
        adaptive: What the user says; None: where nothing else decides K.
        settings: The speculative config; gets the schedule.
        args: vLLM's `EngineArgs`.
        parallel: vLLM's `ParallelConfig`.

    Raises:
        ViSpecError: It was asked for, and something else decides K.
    """
    others = {
        SCHEDULE: settings.get(SCHEDULE) is not None,
        "tree": has_tree,
        "enable_adaptive_verification": bool(settings.get("enable_adaptive_verification")),
        "data_parallel_size": parallel.data_parallel_size > 1,
        "scheduler_cls": args.scheduler_cls is not None,
    }
    found = [name for name, is_given in others.items() if is_given]
    if adaptive and found:
        raise ViSpecError(
            f"speculative config: adaptive=true does not go with {found[0]}, by which the number "
            "of draft tokens is decided; leave one of them out"
        )
    if found or adaptive is False:
        return False
    settings[SCHEDULE] = ladder_schedule(settings["num_speculative_tokens"])
    return True


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


@dataclass
class _Trial:
    """A K that is used whatever it is worth, for `steps` more steps or until `drafts` came back."""

    k: int
    steps: int
    drafts: int = 0


class DraftControl:
    """What is known of drafts and step times in one engine, and the K that follows.

    Args:
        choices: K that may be chosen; 0 is always among them.
    """

    def __init__(self, choices: Iterable[int]) -> None:
        self.choices: Sequence[int] = sorted({0, *choices}, reverse=True)
        self.most = self.choices[0]
        self._kept, self._tried = [0.0] * self.most, [0.0] * self.most
        self._times: dict[tuple[int, int], deque[float]] = defaultdict(
            partial(deque, maxlen=_TIMES)
        )
        self._refreshed: dict[tuple[int, int], int] = {}
        self._current: dict[int, int] = {}
        self._told: dict[int, int] = {}
        self._same = 0
        self._step = 0
        self._next_trial: dict[int, int] = {}
        self._pause: dict[int, int] = defaultdict(lambda: _FIRST_PAUSE)
        self._trial: _Trial | None = None
        self._wait, self._next_probe = _LEAST_WAIT, 0

    # What happened.

    def saw_draft(self, drafted: int, accepted: int) -> None:
        """Count one request's draft tokens that were verified in one step."""
        for position in range(min(drafted, accepted + 1, self.most)):
            self._tried[position] += 1
            self._kept[position] += position < accepted
            if self._tried[position] > _WINDOW:
                self._tried[position] /= 2
                self._kept[position] /= 2
        if self._trial is not None and self._trial.drafts:
            self._trial.drafts -= 1
            self._end_trial(self._trial.drafts == 0)

    def saw_step(self, k: int, batch: int, seconds: float) -> None:
        """Note how long a step took in which each of ``batch`` requests had ``k`` draft tokens."""
        if seconds > 0:
            self._times[k, _size(batch)].append(seconds)

    # What follows.

    def gain(self, k: int) -> float:
        """Return the tokens that a step with ``k`` draft tokens brings a request."""
        prior_kept, prior_tried = _PRIOR
        chances = (
            (kept + prior_kept) / (tried + prior_tried)
            for kept, tried in zip(self._kept[:k], self._tried[:k], strict=True)
        )
        return 1 + sum(accumulate(chances, mul))

    def cost(self, k: int, batch: int) -> float:
        """Return how many times as long as one without drafts a step with ``k`` of them takes."""
        size = _size(batch)
        plain, mine = self._plain_time(size), self._time(k, size)
        if k == 0 or plain is None or mine is None:
            return 1 + GUESSED_COST * k
        return max(mine / plain, 1.0)

    def choose(self, batch: int, drafting: int) -> int:
        """Return K for the step that is being scheduled; to be asked once a step.

        Args:
            batch: Its requests.
            drafting: How many of them can be drafted for.
        """
        self._step += 1
        size = _size(batch)
        if self._trial is not None:
            self._trial.steps -= 1
            self._end_trial(self._trial.steps < 0)
        if not drafting:
            return 0
        if self._trial is None:
            best = self._best(batch)
            self._begin_trial(best, size)
            self._note(best, size)
            if self._trial is None:
                return best
        return self._trial.k

    def news(self, batch: int) -> str | None:
        """Return a line for the log if another K has settled at this load, else None."""
        size = _size(batch)
        now, before = self._current.get(size, self.most), self._told.get(size, self.most)
        if now == before or self._same < _SETTLED:
            return None
        self._told[size] = now
        k = max(now, before)
        load = f"{2 ** (size - 1)} to {2**size - 1} requests" if size > 1 else "1 request"
        return (
            f"with {load} a step drafts {now} tokens instead "
            f"of {before}: with {k} it brings {self.gain(k):.2f} tokens a request and takes "
            f"{self.cost(k, batch):.2f} times as long as without"
        )

    def _best(self, batch: int) -> int:
        def worth(k: int) -> float:
            return self.gain(k) / self.cost(k, batch)

        paying = [k for k in self.choices if k == 0 or self.gain(k) >= LEAST_GAIN]
        best = max(paying, key=worth)
        current = self._current.get(_size(batch), self.most)
        # Drafts that cost more than they bring end at once; everything else waits for the margin.
        is_bad = current not in paying or worth(current) < 1
        return best if is_bad or worth(best) > MARGIN * worth(current) else current

    def _note(self, best: int, size: int) -> None:
        is_same = self._current.get(size, self.most) == best
        self._same = self._same + 1 if is_same else 0
        self._current[size] = best
        if best:
            self._wait = _LEAST_WAIT
            self._next_probe = self._step + self._wait

    def _begin_trial(self, best: int, size: int) -> None:
        if best == 0:
            if self._step >= self._next_probe:
                # What failed long ago must not outvote what is seen now.
                factor = min(1.0, _KEPT_AT_PROBE / max(self._tried[0], 1.0))
                self._kept = [factor * one for one in self._kept]
                self._tried = [factor * one for one in self._tried]
                self._trial = _Trial(self.choices[-2], _PROBE_STEPS, _PROBE_DRAFTS)
                self._wait = min(2 * self._wait, _MOST_WAIT)
                self._next_probe = self._step + self._wait
            return
        if self._step < self._next_trial.get(size, 0):
            return
        others = [k for k in self.choices if k]
        if len(others) == 1:
            others.append(0)
        unknown = [k for k in others if self._time(k, size) is None]
        k = min(unknown or others, key=lambda k: self._refreshed.get((k, size), 0))
        self._refreshed[k, size] = self._step
        # Under some loads hardly any step can be timed.
        self._pause[size] = min(2 * self._pause[size], _PAUSE) if unknown else _PAUSE
        self._next_trial[size] = self._step + self._pause[size]
        self._trial = _Trial(k, _TRIAL_STEPS)

    def _end_trial(self, is_over: bool) -> None:
        if is_over:
            self._trial = None

    def _time(self, k: int, size: int) -> float | None:
        times = self._times.get((k, size), ())
        return median(times) if len(times) >= _ENOUGH_TIMES else None

    def _plain_time(self, size: int) -> float | None:
        """Seconds of a step without drafts: measured, or where the line meets K = 0."""
        measured = self._time(0, size)
        if measured is not None:
            return measured
        timed = [(k, time) for k in self.choices if k and (time := self._time(k, size))]
        if len(timed) < 2:
            return None
        (last, most), (first, least) = timed[0], timed[-1]
        slope = max(most - least, 0.0) / (last - first)
        return max(least - first * slope, 0.25 * least)


def _size(batch: int) -> int:
    return batch.bit_length()
