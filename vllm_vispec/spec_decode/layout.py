"""Where a request's images lie, in prompt tokens and in draft rows.

Draft row ``p`` pairs the target's hidden state at position ``p`` with the embedding of token
``p + 1``.  An image on prompt tokens ``[begin, end)`` therefore occupies draft rows
``[begin - 1, end - 1)``; the row ``end - 1`` is text again and is the first to use the image's
global feature (reference semantics 4.1 - 4.4).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

VISION_MODALITIES = ("image", "video")


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

    Images that touch form one run, as in the reference (4.8): the adaptor reads all of their
    embeddings at once.  ``parts`` lists those embeddings in order and is the run's identity.
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
        """First draft row behind all images, from which on every row has one code."""
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
    """Drop the embedding of prompt token 0: no draft row pairs with it (reference 4.2)."""
    if run.begin > 0:
        return tuple(run.parts)
    head, *rest = run.parts
    trimmed = FeatureSlice(head.identifier, head.start + 1, head.stop)
    return tuple(part for part in (trimmed, *rest) if part.start < part.stop)


@dataclass(frozen=True)
class RowCodes:
    """Numbering of the draft's row table.

    Image slot ``s`` owns the codes ``s * num_query_tokens + j``: ``j = 0`` is a text row that
    carries the image's global feature, ``j >= 1`` is compact token ``j - 1``.  Slot 0 is "no
    image yet".  The code behind them marks a hole, a row that no query may see.  The last ones are
    those of a compressor's tokens, one code for each branch that is told apart; what such a row
    holds is no matter of its code.
    """

    num_slots: int
    num_query_tokens: int
    num_branches: int = 0

    @property
    def hole(self) -> int:
        """Code of a masked row."""
        return self.num_slots * self.num_query_tokens

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.hole + 1 + self.num_branches

    def token(self, branch: int) -> int:
        """Code of a row that holds a compressor's token of this branch."""
        return self.hole + 1 + branch

    def text(self, slot: int) -> int:
        """Code of a text row behind the image in ``slot``."""
        return slot * self.num_query_tokens


def write_row_codes(
    layout: RequestLayout,
    codes: RowCodes,
    slot_of: Callable[[ImageRun], int | None],
    first_row: int,
    out: np.ndarray,
) -> None:
    """Write the codes of draft rows ``first_row .. first_row + len(out) - 1`` into ``out``.

    A function of absolute position alone, so it serves a whole prompt, a chunk of one, what is
    left after a prefix hit, a resumed request and decoding alike.

    Args:
        layout: The request's vision runs.
        codes: Numbering of the row table.
        slot_of: Table slot of a run, or None if its features are not available; such a run has
            no compact tokens and the text behind it is treated as having no image.
        first_row: Absolute position of the first row.
        out: int32 ``[num_rows]``.
    """
    out[:] = codes.text(0)
    for run in layout.runs_within(first_row, first_row + len(out)):
        slot = slot_of(run)
        out[max(run.text_row - first_row, 0) :] = codes.text(slot or 0)
        if run.text_row > first_row:
            _write_image_rows(run, codes, slot, first_row, out)


def write_text_codes(
    layout: RequestLayout,
    codes: RowCodes,
    slot_of: Callable[[ImageRun], int | None],
    first_row: int,
    out: np.ndarray,
) -> None:
    """Like :func:`write_row_codes` for heads without compression: every row is text.

    An image's rows use what the text before it does, the global feature of an earlier image.
    """
    out[:] = codes.text(0)
    for run in layout.runs_ended(first_row, first_row + len(out)):
        out[max(run.text_row - first_row, 0) :] = codes.text(slot_of(run) or 0)


def _write_image_rows(
    run: ImageRun, codes: RowCodes, slot: int | None, first_row: int, out: np.ndarray
) -> None:
    """Holes, then the last ``num_query_tokens - 1`` rows of the run as compact tokens.

    A run with fewer rows than compact tokens keeps the last of the tokens, one per row; the
    reference leaves that case undefined (4.8).
    """
    num_compact = min(codes.num_query_tokens - 1, run.text_row - run.first_row)
    if slot is None:
        num_compact = 0
    begin = max(run.first_row, first_row)
    end = min(run.text_row, first_row + len(out))
    out[begin - first_row : end - first_row] = codes.hole
    compact_begin = run.text_row - num_compact
    for row in range(max(compact_begin, begin), end):
        out[row - first_row] = codes.text(slot or 0) + codes.num_query_tokens - (run.text_row - row)


@dataclass(frozen=True)
class RowRules:
    """How a kind of head lays out its rows: the two functions the engine calls."""

    build_layout: Callable[[Sequence[FeatureLike]], RequestLayout]
    write: Callable[..., None]


def row_rules(compress: bool, global_feature: bool) -> RowRules:
    """Return the rules of a head with these flags."""
    if compress:
        return RowRules(build_layout, write_row_codes)
    if global_feature:
        return RowRules(build_layout, write_text_codes)
    # Without an adaptor no row depends on an image.
    return RowRules(lambda features: RequestLayout(), write_text_codes)
