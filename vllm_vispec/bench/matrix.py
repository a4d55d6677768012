"""What is compared: variants, the settings of a matrix, the order in which cells are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.heads import plain_eagle_head, zeroed_head
from vllm_vispec.bench.schedules import K_SETTING, SETTING, Ranges, check_ranges, speculative_config
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, CellKey, Record
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag

MAX_DRAFT_TOKENS = 32
AXES = ("variants", "concurrency", "num_speculative_tokens", "temperatures", "image_tokens")
"""Settings that a later call may widen; all others must stay as they were in a run's folder."""
POINT_AXES: Mapping[str, str] = MappingProxyType(
    {
        "num_speculative_tokens": "num_speculative_tokens",
        "image_tokens": "image_tokens",
        "temperature": "temperatures",
        "concurrency": "concurrency",
    }
)
"""Fields of a cell's key by the setting that lists their values; the last one varies fastest."""
DESIGNS = ("full", "star")
_LIMITS = {
    "concurrency": (1, inf),
    "num_speculative_tokens": (0, MAX_DRAFT_TOKENS),
    "temperatures": (0, 10),
    "image_tokens": (IMAGES_AS_THEY_ARE, inf),
    "repetitions": (1, inf),
    "waves": (1, inf),
    "least": (1, inf),
    "warm_up": (0, inf),
}
# vLLM's lookup looks for the longest repeated n-gram between these lengths.
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
NO_DRAFT = {K_SETTING: 1, SETTING: [[1, 1, 0]]}
"""K = 0 as vLLM takes it: the draft is loaded and kept up, and proposes nothing."""

Repetition = tuple[CellKey, int]
"""One measurement of a cell; the number counts from 0."""


@dataclass(frozen=True)
class MatrixSettings(Record):
    """The matrix and what all its cells share.

    First sentences are the options' help.

    Attributes:
        target: Target: a folder or hub id.
        dataset: How to read --data: mmspec, vispec, openai or tiny.
        head: ViSpec head: a folder or hub id. None if no variant needs it.
        eagle_head: Text-trained head for the variant eagle.
        variants: Of plain, ngram, eagle, vispec_zeroed, vispec, vispec_tuned.
        concurrency: Requests in flight, e.g. 1,4,16. Each value is a cell.
        num_speculative_tokens: K, e.g. 3,5. Every value is a group of servers of its own. At 0 the
            draft is kept up and proposes nothing.
        schedule: K by batch size for vispec_tuned: JSON or a file.
        temperatures: 0 is greedy; e.g. 0,1.
        image_tokens: Image tokens of a request, e.g. native,0,256. Native is
            `IMAGES_AS_THEY_ARE`, and 0 sends no image.
        design: full: every combination; star: each axis by itself. The others are then at their
            first values.
        repetitions: Of every cell.
        waves: Questions of a cell per request in flight. It asks at least so many.
        least: Questions of a cell, at least. Or all there are.
        warm_up: Requests before a server's first cell. They are not recorded.
        serve_args: Options of vllm serve for all variants, one string.
        cell_timeout_s: Longest cell, in seconds.

    Raises:
        ViSpecError: a value is unknown, missing or impossible.
    """

    target: str
    dataset: str = "openai"
    head: str | None = None
    eagle_head: str | None = None
    variants: tuple[str, ...] = ("plain", "vispec")
    concurrency: tuple[int, ...] = (1,)
    num_speculative_tokens: tuple[int, ...] = (4,)
    schedule: Ranges = ()
    temperatures: tuple[float, ...] = (0.0,)
    image_tokens: tuple[int, ...] = (IMAGES_AS_THEY_ARE,)
    design: str = "full"
    repetitions: int = 3
    waves: int = 2
    least: int = 24
    warm_up: int = 2
    serve_args: tuple[str, ...] = ()
    cell_timeout_s: float = 7200.0

    def __post_init__(self) -> None:
        """Check everything that needs no files."""
        for name in AXES:
            values = getattr(self, name)
            if not values:
                raise ViSpecError(f"{as_flag(name)} has no value: give at least one")
            if len(set(values)) < len(values):
                raise ViSpecError(f"{as_flag(name)} names a value twice: name each once")
        for name, (low, high) in _LIMITS.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not low <= value <= high:
                    limits = f"at least {low}" if high == inf else f"{low} to {high}"
                    raise ViSpecError(f"{as_flag(name)} {value}: choose {limits}")
        if self.design not in DESIGNS:
            known = ", ".join(DESIGNS)
            raise ViSpecError(f"--design {self.design} is unknown: choose from {known}")
        if self.schedule:
            check_ranges(self.schedule)
        for name in self.variants:
            if name not in VARIANTS:
                known = ", ".join(VARIANTS)
                raise ViSpecError(f"--variants: {name} is unknown: choose from {known}")
            for needed in VARIANTS[name].needs:
                if not getattr(self, needed):
                    raise ViSpecError(
                        f"--variants: {name} needs {as_flag(needed)}: give it, or leave {name} out"
                    )

    def num_questions(self, concurrency: int) -> int:
        """Return how many questions a cell asks, if the dataset has as many."""
        return max(self.waves * concurrency, self.least)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; how long a cell may take is no setting of a run."""
        content = super().to_json()
        del content["cell_timeout_s"]
        return {**content, "schedule": content["schedule"] or None}

    def groups(self) -> Iterator[tuple[int, list[Repetition]]]:
        """Yield, for every K, what is measured while its servers are up, in order.

        All variants of a point follow each other, so that a slow minute hits all of them; who goes
        first alternates from point to point and from repetition to repetition.
        """
        matrix = points(vars(self))
        for num_tokens in self.num_speculative_tokens:
            here = [keys for keys in matrix if keys[0].num_speculative_tokens == num_tokens]
            yield (
                num_tokens,
                [
                    (key, repetition)
                    for repetition in range(self.repetitions)
                    for number, keys in enumerate(here)
                    for key in keys[:: -1 if (repetition + number) % 2 else 1]
                ],
            )


def points(settings: Mapping[str, Any]) -> list[list[CellKey]]:
    """Return the cells of a matrix in order, those that differ only in their variant together.

    Args:
        settings: by name, of `MatrixSettings` or as they were written down.
    """
    found = []
    for chosen in product(*(enumerate(settings[name]) for name in POINT_AXES.values())):
        if settings.get("design") == "star" and sum(place > 0 for place, _ in chosen) > 1:
            continue
        fields = dict(zip(POINT_AXES, (value for _, value in chosen), strict=True))
        fields["dataset"] = settings["dataset"]
        found.append([CellKey(variant=variant, **fields) for variant in settings["variants"]])
    return found


@dataclass(frozen=True)
class Variant:
    """One way to serve the target.

    Attributes:
        summary: what a report says about it.
        draft: makes what goes into vLLM's speculative config besides K, from the settings and a
            folder for heads that are made for the run; None: no speculation. A variant that
            chooses K itself puts it there too.
        needs: settings without which it cannot be served.
    """

    summary: str
    draft: Callable[[MatrixSettings, Path], Mapping[str, Any]] | None
    needs: tuple[str, ...] = ()

    def speculative_config(
        self, settings: MatrixSettings, folder: Path, num_tokens: int
    ) -> dict[str, Any] | None:
        """Return vLLM's speculative config for this variant, None without speculation.

        Args:
            folder: gets the heads that are made for the run.
            num_tokens: K; 0 keeps the draft up without proposing anything.

        Raises:
            ViSpecError: the variant's head cannot be used.
        """
        if self.draft is None:
            return None
        k = {K_SETTING: num_tokens} if num_tokens else NO_DRAFT
        draft = self.draft(settings, folder)
        return dict(draft) if K_SETTING in draft else {**draft, **k}


def _eagle(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    head = plain_eagle_head(settings.eagle_head or "", settings.target, folder / "eagle")
    return {"method": "eagle", "model": head}


def _vispec_zeroed(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    head = zeroed_head(settings.head or "", folder / "vispec_zeroed")
    return {"method": "vispec", "model": head}


def _vispec(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    return {"method": "vispec", "model": settings.head}


def _vispec_tuned(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    return speculative_config(_vispec(settings, folder), settings.schedule) or {}


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "plain": Variant("vLLM without speculation", None),
        "ngram": Variant(
            "vLLM's n-gram lookup in the prompt and the answer; steps in which it finds nothing "
            "are not counted",
            lambda *_: NGRAM,
        ),
        "eagle": Variant("vLLM's EAGLE with a text-trained head", _eagle, ("eagle_head",)),
        "vispec_zeroed": Variant(
            "ViSpec whose vision adaptor puts out zeros", _vispec_zeroed, ("head",)
        ),
        "vispec": Variant("ViSpec", _vispec, ("head",)),
        "vispec_tuned": Variant(
            "ViSpec with K by the number of running requests", _vispec_tuned, ("head", "schedule")
        ),
    }
)
