"""What the engine does with the heads of a study: acceptance on every question, speed on some.

The engine with the head and one without stay up side by side. Both answer the timed questions in
turns, at batch 1 and greedy; the others are answered by the head's engine alone and compared with
plain answers that are kept for all heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.study import NUM_DRAFT_TOKENS, Study, Trained, Variant, Workspace
from benchmarks.turns import Engine, Job
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import IMAGE_FAMILIES
from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.utils.files import write_json

IMAGES = "image tasks"
GROUPS: Mapping[str, tuple[str, ...]] = {
    IMAGES: IMAGE_FAMILIES,
    **{name: (name,) for name in FAMILIES},
}


@dataclass(frozen=True)
class Asked:
    """One question answered with a head.

    Attributes:
        accepted: Accepted draft tokens of every step, those behind the answer's end left out.
        decoded: Tokens after the first.
        identical: Whether the tokens are those of plain decoding.
        plain_seconds, draft_seconds: Decode time of both engines; None if not timed.
    """

    family: str
    accepted: tuple[int, ...]
    decoded: int
    identical: bool
    plain_seconds: float | None = None
    draft_seconds: float | None = None


def ask_all(study: Study) -> None:
    """Ask the engine about every head that has no result yet."""
    missing = []
    for trained in study.heads():
        if not study.workspace.head(trained).is_dir():
            print(f"not trained, so not measured: {trained.name}", flush=True)
        elif not study.workspace.result("cells", trained).is_file():
            missing.append(trained)
    if not missing:
        return
    with _engine("plain", study, None) as plain:
        expected = _plain_answers(study, plain)
        for trained in missing:
            with _engine(trained.name, study, trained) as drafting:
                asked = [
                    _ask(plain, drafting, sample, study, expected)
                    for sample in range(len(expected))
                ]
            write_json(study.workspace.result("cells", trained), [asdict(one) for one in asked])


def _engine(name: str, study: Study, trained: Trained | None) -> Engine:
    speculative = None
    if trained is not None:
        head, k = str(study.workspace.head(trained)), NUM_DRAFT_TOKENS
        speculative = {"method": "vispec", "model": head, "num_speculative_tokens": k}
    job = Job(study.target, speculative, per_family=study.per_family)
    return Engine(name, job, study.workspace.log(f"engine-{name}"), study.threads)


def _plain_answers(study: Study, plain: Engine) -> list[list[int]]:
    file = study.workspace.root / f"plain-{study.per_family}.json"
    if not file.is_file():
        samples = range(study.per_family * len(FAMILIES))
        write_json(file, [plain.ask([sample]).token_ids[0] for sample in samples])
    return list(json.loads(file.read_text()))


def _ask(
    plain: Engine, drafting: Engine, sample: int, study: Study, expected: Sequence[Sequence[int]]
) -> Asked:
    engines = [drafting]
    if sample % study.per_family < study.timed:
        # Whoever comes second may find warmer caches.
        engines = [plain, drafting] if sample % 2 else [drafting, plain]
    replies = {engine.name: engine.ask([sample]) for engine in engines}
    mine, other = replies[drafting.name], replies.get(plain.name)
    return Asked(
        family=tuple(FAMILIES)[sample // study.per_family],
        accepted=mine.accepted[0],
        decoded=len(mine.token_ids[0]) - 1,
        identical=list(mine.token_ids[0]) == list(expected[sample]),
        plain_seconds=other.decode_seconds if other else None,
        draft_seconds=mine.decode_seconds if other else None,
    )


def read_asked(file: Path) -> list[Asked]:
    """What `ask_all` wrote."""
    return [
        Asked(**(fields | {"accepted": tuple(fields["accepted"])}))
        for fields in json.loads(file.read_text())
    ]


class Accepted(Protocol):
    """A question with the accepted draft tokens of every step of its answer."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """See above."""


Question = TypeVar("Question", bound=Accepted)
Seeds = Sequence[Sequence[Question]]  # per seed, the same questions in the same order
Statistic = Callable[[Sequence[Question]], float]
Found = Mapping[tuple[str, int], Seeds[Asked]]  # by variant and epochs


def acceptance_length(asked: Sequence[Accepted]) -> float:
    """Accepted draft tokens of a step, plus the bonus token."""
    steps = sum(len(one.accepted) for one in asked)
    return 1 + sum(sum(one.accepted) for one in asked) / max(steps, 1)


def decode_speedup(asked: Sequence[Asked]) -> float:
    """Decode time of plain vLLM over that with the head, on the timed questions."""
    plain = sum(one.plain_seconds or 0.0 for one in asked)
    draft = sum(one.draft_seconds or 0.0 for one in asked)
    return plain / draft if draft else float("nan")


def estimate(seeds: Seeds[Question], statistic: Statistic[Question]) -> dict[str, Any]:
    """Mean over seeds, its 95 % interval over seeds and questions, and the value of every seed."""
    values = [statistic(asked) for asked in seeds]
    low, high = bootstrap(seeds, (0, 1), lambda drawn: _mean_over(drawn, statistic)).tolist()
    return {"mean": _mean_over(seeds, statistic), "low": low, "high": high, "seeds": values}


def ratio(
    one: Seeds[Question], other: Seeds[Question], statistic: Statistic[Question]
) -> dict[str, Any]:
    """How many times larger the statistic of `one` is; the same draws on both sides."""
    values = [statistic(a) / statistic(b) for a, b in zip(one, other, strict=True)]

    def ratio_of_means(both: Iterable[Iterable[Iterable[Question]]]) -> float:
        mine, theirs = (_mean_over(part, statistic) for part in both)
        return mine / theirs

    low, high = bootstrap([one, other], (1, 2), ratio_of_means).tolist()
    return {"mean": ratio_of_means([one, other]), "low": low, "high": high, "seeds": values}


def _mean_over(seeds: Iterable[Iterable[Question]], statistic: Statistic[Question]) -> float:
    values = [statistic(list(asked)) for asked in seeds]
    return sum(values) / len(values)


def shown(found: Mapping[str, Any] | None) -> str:
    """A mean with its interval, as in tables."""
    return f"{found['mean']:.2f} ({found['low']:.2f}-{found['high']:.2f})" if found else ""


def read_all(workspace: Workspace, variants: Iterable[Variant], seeds: Sequence[int]) -> Found:
    """Answers with the heads of all variants of which every seed was measured."""
    found: dict[tuple[str, int], Seeds[Asked]] = {}
    for variant in variants:
        for epochs in variant.epochs:
            files = [workspace.result("cells", Trained(variant, epochs, seed)) for seed in seeds]
            if all(file.is_file() for file in files):
                found[variant.name, epochs] = [read_asked(file) for file in files]
    return found


def make_rows(
    found: Found, variants: Iterable[Variant], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One row of the JSON per measured variant and number of epochs."""
    return [
        _row(variant, epochs, tuple(seeds), found)
        for variant in variants
        for epochs in variant.epochs
        if (variant.name, epochs) in found
    ]


def _row(variant: Variant, epochs: int, seeds: tuple[int, ...], found: Found) -> dict[str, Any]:
    asked, before = found[variant.name, epochs], found.get((variant.after, epochs))
    everything = [one for answers in asked for one in answers]
    timed = [[one for one in answers if one.plain_seconds is not None] for answers in asked]
    several = len(variant.epochs) > 1
    return {
        "arm": variant.name,
        "label": f"{variant.label}, epoch {epochs}" if several else variant.label,
        "data": variant.data,
        "answers": variant.answers,
        "settings": dict(variant.settings),
        "epochs": epochs,
        "seeds": seeds,
        "identical": sum(one.identical for one in everything),
        "answers_compared": len(everything),
        "acceptance_length": {
            name: estimate(only(asked, names), acceptance_length) for name, names in GROUPS.items()
        },
        "decode_speedup": {
            name: estimate(only(timed, names), decode_speedup) for name, names in GROUPS.items()
        },
        "over": variant.after,
        "acceptance_length_ratio": compare(asked, before) if before else None,
    }


def compare(asked: Seeds[Asked], before: Seeds[Asked]) -> dict[str, Any]:
    """Ratio of acceptance_length on the image tasks."""
    names = GROUPS[IMAGES]
    return ratio(only(asked, names), only(before, names), acceptance_length)


def only(seeds: Seeds[Asked], families: Sequence[str]) -> list[list[Asked]]:
    """Of every seed the answers to questions of these families."""
    return [[one for one in asked if one.family in families] for asked in seeds]
