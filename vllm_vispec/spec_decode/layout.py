"""Where a request's images lie, in prompt tokens and in draft rows.

Draft row ``p`` pairs the target's hidden state at position ``p`` with the embedding of token
``p + 1``.  An image on prompt tokens ``[begin, end)`` therefore occupies draft rows
``[begin - 1, end - 1)``. The row ``end - 1`` is text again and is the first to use the image's
global feature (docs/reference-semantics.md, 4.1 to 4.4).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

# Kimi-K2.5's images, and the chunks of its videos, are all of the third kind.
VISION_MODALITIES = ("image", "video", "vision_chunk")


class PlaceholderLike(Protocol):
    """The part of vLLM's ``PlaceholderRange`` that is read here."""

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        """Return the inclusive ``(first, last)`` prompt positions of embedded stretches."""
        ...


class FeatureLike(Protocol):
    """The part of vLLM's ``MultiModalFeatureSpec`` that is read here."""

    @property
    def modality(self) -> str:
        """Such as ``image``."""
        ...

    @property
    def identifier(self) -> str:
        """Hash of the item's content."""
        ...

    @property
    def mm_position(self) -> PlaceholderLike:
        """Where it lies in the prompt."""
        ...


@dataclass(frozen=True)
class FeatureSlice:
    """Rows ``[start, stop)`` of the vision tower's output for the item hashed ``identifier``."""

    identifier: str
    start: int
    stop: int


@dataclass(frozen=True)
class ImageRun:
    """A maximal stretch ``[begin, end)`` of vision tokens in the prompt.

    Images that touch form one run (docs/reference-semantics.md, 4.8): the adaptor reads all of
    their embeddings at once. ``parts`` lists those embeddings in order and is the run's identity.
    """

    begin: int
    end: int
    parts: tuple[FeatureSlice, ...]

    @property
    def first_row(self) -> int:
        """First draft row of the run; a run at the prompt's start has no row before it."""
        return max(self.begin - 1, 0)

    @property
    def text_row(self) -> int:
        """First draft row after the run, the first that carries its global feature."""
        return self.end - 1

    @property
    def part_rows(self) -> Iterator[tuple[FeatureSlice, int]]:
        """Each image of the run with its first draft row; one row for each of its embeddings."""
        row = self.first_row
        for part in self.parts:
            yield part, row
            row += part.stop - part.start


@dataclass(frozen=True)
class RequestLayout:
    """The vision runs of one request, in prompt order."""

    runs: tuple[ImageRun, ...] = ()

    @cached_property
    def _first_rows(self) -> tuple[int, ...]:
        return tuple(run.first_row for run in self.runs)

    @cached_property
    def stop_row(self) -> int:
        """First draft row behind all images, from which on all rows have one id."""
        return self.runs[-1].text_row if self.runs else 0

    @cached_property
    def _text_rows(self) -> tuple[int, ...]:
        return tuple(run.text_row for run in self.runs)

    def runs_ended(self, first_row: int, stop_row: int) -> tuple[ImageRun, ...]:
        """Return the runs whose global feature rows ``[first_row, stop_row)`` use, in order.

        Those are the runs behind which text begins inside and the last one before.
        """
        start = max(bisect_right(self._text_rows, first_row) - 1, 0)
        return self.runs[start : bisect_left(self._text_rows, stop_row)]

    def runs_within(self, first_row: int, stop_row: int) -> tuple[ImageRun, ...]:
        """Return the runs that decide rows ``[first_row, stop_row)``, in prompt order.

        Those are the runs that begin inside and the last one that begins before.
        """
        start = max(bisect_right(self._first_rows, first_row) - 1, 0)
        return self.runs[start : bisect_left(self._first_rows, stop_row)]


@dataclass
class _OpenRun:
    begin: int
    end: int
    parts: list[FeatureSlice] = field(default_factory=list)


def build_layout(features: Sequence[FeatureLike]) -> RequestLayout:
    """Turn a request's multimodal features into vision runs.

    A video is one feature with one stretch per frame where the prompt separates frames by text,
    and one stretch in all where it does not.  Other modalities are left to the text path.
    """
    stretches: list[tuple[int, int, FeatureSlice]] = []
    for feature in features:
        if feature.modality not in VISION_MODALITIES:
            continue
        taken = 0
        for first, last in feature.mm_position.extract_embeds_range():
            length = last - first + 1
            part = FeatureSlice(feature.identifier, taken, taken + length)
            stretches.append((first, last + 1, part))
            taken += length
    open_runs: list[_OpenRun] = []
    for begin, end, part in sorted(stretches, key=lambda stretch: stretch[0]):
        if not open_runs or open_runs[-1].end != begin:
            open_runs.append(_OpenRun(begin, begin))
        open_runs[-1].end = end
        open_runs[-1].parts.append(part)
    runs = (ImageRun(run.begin, run.end, _visible_parts(run)) for run in open_runs)
    return RequestLayout(tuple(run for run in runs if run.parts))


def _visible_parts(run: _OpenRun) -> tuple[FeatureSlice, ...]:
    """Drop the embedding of prompt token 0: no draft row pairs with it."""
    if run.begin > 0:
        return tuple(run.parts)
    head, *rest = run.parts
    trimmed = FeatureSlice(head.identifier, head.start + 1, head.stop)
    return tuple(part for part in (trimmed, *rest) if part.start < part.stop)
