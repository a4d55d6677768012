"""Chooses K, the number of draft tokens a step, by what drafts have been worth so far.

A state of counts and step times, without vLLM in it. A step in which every request has K draft
tokens brings ``gain(K)`` tokens a request and takes ``cost(K)`` times as long as one without. The K
with the largest ``gain / cost`` is chosen, 0 where no K is worth its cost.

* ``gain`` is 1 plus the expected accepted tokens: the chances, position by position, that a draft
  token is accepted if those before it were. Old drafts count less and less.
* ``cost`` is measured for each size of batch (powers of two). Every draft token adds one pass of
  the draft and one row to verify, so times grow along a line in K. Where it meets K = 0 is the time
  of a step without drafts. Until two K have been timed, a guess stands for the cost.

Trees are drafted whole or not at all: K is their number of nodes or 0.

Now and then another K is tried for a few steps, so that its time stays known. While K is 0, drafts
are probed again: after a pause that doubles as long as they fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from statistics import median
from typing import Any

from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError

SCHEDULE = "num_speculative_tokens_per_batch_size"
GUESSED_COST = 0.06
"""What a pass of the draft adds until it is measured, as a share of a plain step's time."""
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


def ladder(most: int, tree: TreeSettings | None = None) -> list[int]:
    """Return the K to choose from, largest first: halves down to 1, and 0; of trees all or none."""
    if tree is not None:
        return [most, 0]
    found = [most]
    while found[-1]:
        found.append(found[-1] // 2)
    return found


def ladder_schedule(steps: Sequence[int], max_requests: int | None) -> list[list[int]]:
    """Return a load schedule that makes vLLM record CUDA graphs for every K of the ladder.

    vLLM reads K off it by the number of requests; our scheduler chooses otherwise.  vLLM records
    for each K batches as large as those to which the schedule gives it, so the largest are given,
    K = 0 the very largest.  An engine with room for fewer requests than there are K records some of
    them: all, none, then what lies between.

    Args:
        steps: What `ladder` returned.
        max_requests: vLLM's ``max_num_seqs``; None: its default, a size that is recorded anyway.
    """
    room = max_requests or len(steps)
    first, *others = sorted([steps[0], 0, *steps[1:-1]][:room], reverse=True)
    last = room - len(others)
    return [[1, last, first], *([n, n, k] for n, k in enumerate(others, start=last + 1))]


def resolve_adaptive(
    adaptive: bool | None,
    settings: dict[str, Any],
    args: Any,
    parallel: Any,
    tree: TreeSettings | None,
) -> bool:
    """Return whether K follows load and acceptance; if so, let vLLM record graphs for every K.

    Args:
        adaptive: What the user says; None: for chains, where nothing else decides K.
        settings: The speculative config; gets the schedule.
        args: vLLM's `EngineArgs`.
        parallel: vLLM's `ParallelConfig`.
        tree: How trees grow; None for chains.

    Raises:
        ViSpecError: It was asked for, and something else decides K.
    """
    most = settings["num_speculative_tokens"]
    ends_by_itself = tree is not None and (tree.width == 1 or most <= tree.levels)
    others = {
        SCHEDULE: settings.get(SCHEDULE) is not None,
        "a tree of a single path": ends_by_itself,
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
    # Trees follow only where they are told to.
    if found or not (tree is None if adaptive is None else adaptive):
        return False
    settings[SCHEDULE] = ladder_schedule(ladder(most, tree), args.max_num_seqs)
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


@dataclass
class _Load:
    """What is known of one size of batch.

    Attributes:
        k: What was chosen last.
        told: What the log has said of it.
        next_trial: The step from which on another K may be tried.
        times: Seconds of the last steps, by K.
        tried: The step in which each K was tried last.
        pause: Steps between two trials.
    """

    k: int
    told: int
    next_trial: int
    times: dict[int, deque[float]] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)
    pause: int = _FIRST_PAUSE

    def saw(self, k: int, seconds: float) -> None:
        self.times.setdefault(k, deque(maxlen=_TIMES)).append(seconds)

    def time(self, k: int) -> float | None:
        times = self.times.get(k, ())
        return median(times) if len(times) >= _ENOUGH_TIMES else None

    def plain_time(self) -> float | None:
        """Seconds of a step without drafts: measured, or where the line meets K = 0."""
        measured = self.time(0)
        if measured is not None:
            return measured
        timed = [(k, time) for k in sorted(self.times) if (time := self.time(k))]
        if len(timed) < 2:
            return None
        (first, least), (last, most) = timed[0], timed[-1]
        slope = max(most - least, 0.0) / (last - first)
        return max(least - first * slope, 0.25 * least)


class DraftControl:
    """What is known of drafts and step times in one engine, and the K that follows.

    Args:
        choices: K that may be chosen; 0 is always among them.
        tree: How trees grow, which accept no more tokens than a path has; None for chains.
    """

    def __init__(self, choices: Iterable[int], tree: TreeSettings | None = None) -> None:
        self.choices: Sequence[int] = sorted({0, *choices}, reverse=True)
        self.most = self.choices[0]
        self._longest = self.most if tree is None else tree.levels
        self._kept, self._tried = [0.0] * self._longest, [0.0] * self._longest
        self._loads: dict[int, _Load] = {}
        self._step = self._same = 0
        self._trial: _Trial | None = None
        self._wait, self._next_probe = _LEAST_WAIT, 0

    # What happened.

    def saw_draft(self, drafted: int, accepted: int) -> None:
        """Count one request's draft tokens that were verified in one step."""
        for position in range(min(drafted, accepted + 1, self._longest)):
            self._tried[position] += 1
            self._kept[position] += position < accepted
            if self._tried[position] > _WINDOW:
                self._tried[position] /= 2
                self._kept[position] /= 2
        if self._trial is not None and self._trial.drafts:
            self._trial.drafts -= 1
            self._end_trial(self._trial.drafts == 0)

    def saw_step(self, k: int, batch: int, seconds: float) -> None:
        """Note how long a step of ``batch`` requests took that drafted and verified ``k`` each."""
        if seconds > 0:
            self._load(batch).saw(k, seconds)

    # What follows.

    def gain(self, k: int) -> float:
        """Return the tokens that a step with ``k`` draft tokens brings a request."""
        prior_kept, prior_tried = _PRIOR
        chances = (
            (kept + prior_kept) / (tried + prior_tried)
            for kept, tried in zip(self._kept[:k], self._tried[:k], strict=True)
        )
        return 1 + sum(accumulate(chances, mul))

    def choose(self, batch: int, drafting: int) -> int:
        """Return K for the step that is being scheduled; to be asked once a step.

        Args:
            batch: Its requests.
            drafting: How many of them can be drafted for.
        """
        self._step += 1
        load = self._load(batch)
        if self._trial is not None:
            self._trial.steps -= 1
            self._end_trial(self._trial.steps < 0)
        if not drafting:
            return 0
        if self._trial is None:
            best = self._best(load)
            self._same = self._same + 1 if best == load.k else 0
            load.k = best
            if best:
                self._wait = _LEAST_WAIT
                self._next_probe = self._step + self._wait
                self._begin_trial(load)
            else:
                self._begin_probe()
        return load.k if self._trial is None else self._trial.k

    def news(self, batch: int) -> str | None:
        """Return a line for the log if another K has settled at this load, else None."""
        load, size = self._load(batch), batch.bit_length()
        now, before = load.k, load.told
        if now == before or self._same < _SETTLED:
            return None
        load.told = now
        k = max(now, before)
        requests = f"{2 ** (size - 1)} to {2**size - 1} requests" if size > 1 else "1 request"
        return (
            f"with {requests} a step drafts {now} tokens instead "
            f"of {before}: with {k} it brings {self.gain(k):.2f} tokens a request and takes "
            f"{self._cost(k, load):.2f} times as long as without"
        )

    def _load(self, batch: int) -> _Load:
        # What is accepted is known a few steps later; no trial holds out until then.
        new = _Load(self.most, self.most, self._step + _FIRST_PAUSE)
        return self._loads.setdefault(batch.bit_length(), new)

    def _cost(self, k: int, load: _Load) -> float:
        """Return how many times as long as one without drafts a step with ``k`` of them takes."""
        plain, mine = load.plain_time(), load.time(k)
        if k == 0 or plain is None or mine is None:
            return 1 + GUESSED_COST * min(k, self._longest)
        return max(mine / plain, 1.0)

    def _best(self, load: _Load) -> int:
        def worth(k: int) -> float:
            return self.gain(k) / self._cost(k, load)

        paying = [k for k in self.choices if k == 0 or self.gain(k) >= LEAST_GAIN]
        best = max(paying, key=worth)
        # Drafts that cost more than they bring end at once; everything else waits for the margin.
        is_bad = load.k not in paying or worth(load.k) < 1
        return best if is_bad or worth(best) > MARGIN * worth(load.k) else load.k

    def _begin_probe(self) -> None:
        """Draft again, if the pause is over, to see what is accepted now."""
        if self._step < self._next_probe:
            return
        # What failed long ago must not outvote what is seen now.
        factor = min(1.0, _KEPT_AT_PROBE / max(self._tried[0], 1.0))
        self._kept = [factor * one for one in self._kept]
        self._tried = [factor * one for one in self._tried]
        self._trial = _Trial(self.choices[-2], _PROBE_STEPS, _PROBE_DRAFTS)
        self._wait = min(2 * self._wait, _MOST_WAIT)
        self._next_probe = self._step + self._wait

    def _begin_trial(self, load: _Load) -> None:
        """Try the K whose time is least known, if the pause is over."""
        if self._step < load.next_trial:
            return
        others = self.choices
        if len(others) > 2:
            # Times of two K give that of none.  It was last measured before drafts went on.
            others = others[:-1]
            load.times.pop(0, None)
        unknown = [k for k in others if load.time(k) is None]
        k = min(unknown or others, key=lambda k: load.tried.get(k, 0))
        load.tried[k] = self._step
        # Under some loads hardly any step can be timed.
        load.pause = min(2 * load.pause, _PAUSE) if unknown else _PAUSE
        load.next_trial = self._step + load.pause
        self._trial = _Trial(k, _TRIAL_STEPS)

    def _end_trial(self, is_over: bool) -> None:
        if is_over:
            self._trial = None
