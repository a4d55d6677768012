"""What the target computed for a sample, and padded batches of it.

Tensor names end in their shape: B samples, L tokens (= rows before compression), D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Observed:
    """One sample with what the target computed for it.

    Attributes:
        sample_id: name of the sample in its file.
        family: task family, "" if unknown.
        token_ids: int64 [L], image placeholders expanded.
        answer: bool [L], tokens the assistant wrote, its end-of-turn token included.
        runs: image runs [start, end) in token indices, one per image.
        embeds_LD: the target's input embeddings, image features scattered in.
        hidden_LD: the target's hidden states after its final norm (what lm_head reads).
    """

    sample_id: str
    family: str
    token_ids: Tensor
    answer: Tensor
    runs: Runs
    embeds_LD: Tensor
    hidden_LD: Tensor


@dataclass(frozen=True)
class DraftBatch:
    """Samples padded on the right to a common length L.

    Attributes:
        ids_BL: int64, 0 behind the end of a sample.
        answer_BL: bool, False behind the end.
        embeds_BLD, hidden_BLD: see `Observed`; zeros behind the end.
        runs: image runs of every sample.
        lengths: tokens of every sample.
        families: task family of every sample.
    """

    ids_BL: Tensor
    answer_BL: Tensor
    embeds_BLD: Tensor
    hidden_BLD: Tensor
    runs: tuple[Runs, ...]
    lengths: tuple[int, ...]
    families: tuple[str, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DraftBatch:
        """The batch on another device, its embeddings and states in another dtype (None: kept)."""
        return replace(
            self,
            ids_BL=self.ids_BL.to(device, non_blocking=True),
            answer_BL=self.answer_BL.to(device, non_blocking=True),
            embeds_BLD=self.embeds_BLD.to(device, dtype, non_blocking=True),
            hidden_BLD=self.hidden_BLD.to(device, dtype, non_blocking=True),
        )


def pad_batch(samples: Sequence[Observed], multiple: int = 1) -> DraftBatch:
    """Pad at least one sample on the right; any number of images each, none included.

    Args:
        multiple: L is one of its multiples. Kernels that are prepared once per shape then meet
            few shapes.
    """
    longest = max(len(sample.token_ids) for sample in samples)
    length = longest + -longest % multiple

    def padded(name: str) -> Tensor:
        rows = [getattr(sample, name) for sample in samples]
        gaps = [(0, 0) * (row.dim() - 1) + (0, length - len(row)) for row in rows]
        return torch.stack([F.pad(row, gap) for row, gap in zip(rows, gaps, strict=True)])

    return DraftBatch(
        ids_BL=padded("token_ids"),
        answer_BL=padded("answer"),
        embeds_BLD=padded("embeds_LD"),
        hidden_BLD=padded("hidden_LD"),
        runs=tuple(sample.runs for sample in samples),
        lengths=tuple(len(sample.token_ids) for sample in samples),
        families=tuple(sample.family for sample in samples),
    )
