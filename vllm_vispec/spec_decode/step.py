"""What the rows of one step are: a row id for every token of the batch.

A step's data flows one way. `layout` says where a request's images lie. The functions here turn
that into row ids. `draft_rows` puts the requests together into one frozen `DraftStep`. The row
table takes that into its buffers, and these are all that the model and its attention read.

Shapes: T tokens of the batch, A rows that hold a compressor's token, S such tokens of all images of
the step, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_vispec.spec_decode.layout import FeatureLike, ImageRun, RequestLayout

# Gives the table slot of a run, None if its features are not available.
SlotFinder = Callable[[ImageRun], int | None]


class RequestRows(NamedTuple):
    """One request's part of the batch.

    Attributes:
        request_id: vLLM's id.
        features: Its multimodal items, empty for text-only requests.
        first_row: Absolute position of its first token in the batch. For a request past its prompt
            any position past the prompt will do.
        num_rows: Its tokens in the batch.
        num_prompt_tokens: Length of its prompt, 0 if not known.
    """

    request_id: str
    features: Sequence[FeatureLike]
    first_row: int
    num_rows: int
    num_prompt_tokens: int = 0

    @property
    def prompt_end(self) -> int | None:
        """Index among its rows of its last prompt token; None if that is not in the batch."""
        index = self.num_prompt_tokens - 1 - self.first_row
        return index if 0 <= index < self.num_rows else None


class PlacedTokens(NamedTuple):
    """A compressor's tokens that stand in rows of the batch.

    Attributes:
        places_2A: int64, on the host; rows of the batch, and which of the tokens stands in each.
        input_SD: On the device; the tokens' layer inputs.
    """

    places_2A: torch.Tensor
    input_SD: torch.Tensor


@dataclass(frozen=True)
class DraftStep:
    """What the device has to know about a batch before its first draft pass.

    Tensors on the host lie in pinned memory where the platform has it.

    Attributes:
        row_ids_T: int32, on the host; numbered by `RowIds`.
        image_tokens: Contents of rows that are in no table, those of a compressor's tokens.
        decisions_T: int32, on the host; the gate decision that each row's queries follow. None for
            heads without a gate.
    """

    row_ids_T: torch.Tensor
    image_tokens: PlacedTokens | None = None
    decisions_T: torch.Tensor | None = None


@dataclass(frozen=True)
class RowIds:
    """Numbering of the row table.

    Image slot ``s`` owns the ids ``s * num_query_tokens + j``: ``j = 0`` is a text row that carries
    the image's global feature, ``j >= 1`` is compressed image token ``j - 1``. Slot 0 is "no image
    yet". The id behind them is that of a masked position, which no query may see. The last ones
    are those of a compressor's tokens, one id for each branch that is told apart; what such a row
    holds does not depend on its id.
    """

    num_slots: int
    num_query_tokens: int
    num_branches: int = 0

    @property
    def masked(self) -> int:
        """Id of a masked position."""
        return self.num_slots * self.num_query_tokens

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.masked + 1 + self.num_branches

    def branch(self, branch: int) -> int:
        """Id of a row that holds a compressor's token of this branch."""
        return self.masked + 1 + branch

    def text(self, slot: int) -> int:
        """Id of a text row behind the image in ``slot``."""
        return slot * self.num_query_tokens


def write_row_ids(
    layout: RequestLayout, ids: RowIds, slot_of: SlotFinder, first_row: int, out: np.ndarray
) -> None:
    """Write the ids of draft rows ``first_row .. first_row + len(out) - 1`` into ``out``.

    The ids depend on absolute positions alone. So this serves a whole prompt, a chunk of one, what
    is left after a prefix hit, a resumed request and decoding alike.

    Args:
        layout: The request's vision runs.
        ids: Numbering of the row table.
        slot_of: A run without a slot has no compressed tokens, and the text behind it counts as
            text without an image.
        first_row: Absolute position of the first row.
        out: int32 ``[num_rows]``.
    """
    out[:] = ids.text(0)
    for run in layout.runs_within(first_row, first_row + len(out)):
        slot = slot_of(run)
        out[max(run.text_row - first_row, 0) :] = ids.text(slot or 0)
        if run.text_row > first_row:
            _write_image_rows(run, ids, slot, first_row, out)


def write_text_row_ids(
    layout: RequestLayout, ids: RowIds, slot_of: SlotFinder, first_row: int, out: np.ndarray
) -> None:
    """Like `write_row_ids` for heads without compression: every row is text.

    An image's rows use what the text before it does, the global feature of an earlier image.
    """
    out[:] = ids.text(0)
    for run in layout.runs_ended(first_row, first_row + len(out)):
        out[max(run.text_row - first_row, 0) :] = ids.text(slot_of(run) or 0)


def _write_image_rows(
    run: ImageRun, ids: RowIds, slot: int | None, first_row: int, out: np.ndarray
) -> None:
    """Mask the run, all but its last ``num_query_tokens - 1`` rows, which hold its tokens.

    A run with fewer rows than tokens keeps the last of the tokens, one per row. The reference
    leaves that case undefined (docs/reference-semantics.md, 4.8).
    """
    num_tokens = min(ids.num_query_tokens - 1, run.text_row - run.first_row)
    if slot is None:
        num_tokens = 0
    begin, end = max(run.first_row, first_row), min(run.text_row, first_row + len(out))
    out[begin - first_row : end - first_row] = ids.masked
    for row in range(max(run.text_row - num_tokens, begin), end):
        # Counted from the run's end, where the last token stands.
        out[row - first_row] = ids.text(slot or 0) + ids.num_query_tokens - (run.text_row - row)
