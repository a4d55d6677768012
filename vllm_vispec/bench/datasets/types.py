"""What a dataset is made of: options, adapters, and what came out of reading one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError

CATEGORIES = ("general_vqa", "text_vqa", "captioning", "charts", "reasoning", "multi_turn")
"""The six task categories that MMSpec and the tiny world of the examples share."""
UNLABELLED = "unlabelled"
"""Family of a record that names none."""
REASONS_SHOWN = 5


@dataclass(frozen=True)
class DatasetOptions:
    """Which part of a dataset is asked, and how.

    Attributes:
        families: Only these, separated by commas. Empty: all task families.
        limit: Most samples; default: all. They are taken from the families in turns.
        seed: Which samples --limit keeps. A sample's place depends on the seed and its own id
            alone, so a smaller limit gives the beginning of what a larger one gives, and adding
            records to a file moves none of the others.
        max_tokens: Longest answer; default: the dataset's.
        image_root: Where image paths start. None: the adapter's convention.

    Raises:
        ViSpecError: `limit` or `max_tokens` is below 1.
    """

    families: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    image_root: Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ViSpecError(f"limit {self.limit} leaves no sample: use at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ViSpecError(f"max_tokens {self.max_tokens} leaves no answer: use at least 1")


Reader = Callable[[Path, DatasetOptions], Iterator[Conversation | Rejected]]


@dataclass(frozen=True)
class Adapter:
    """A way to read a dataset.

    Attributes:
        name: as in `vllm_vispec.bench.datasets.ADAPTERS`.
        summary: what it reads, in one line.
        read: yields the records in their order, image paths absolute. It leaves `families` to its
            caller, apart from not asking for files that no wanted family needs.
        max_tokens: longest answer if the options name none.
        every_question: each question of a dialogue is a sample of its own; else the last one only.
        own_answers: recorded answers between questions are left out, so that the target's own
            stand there.
    """

    name: str
    summary: str
    read: Reader
    max_tokens: int
    every_question: bool = False
    own_answers: bool = False


@dataclass(frozen=True)
class LoadedDataset:
    """The samples to ask, and what became of the rest.

    Attributes:
        samples: families in turns, so that every part of a run sees the same mixture.
        rejected: records and samples that cannot be used, with reasons.
        not_chosen: usable samples that `families` or `limit` left out.
    """

    name: str
    samples: tuple[BenchSample, ...]
    rejected: tuple[Rejected, ...]
    not_chosen: int

    def reasons(self) -> dict[str, int]:
        """How many were rejected for each reason, the most frequent first."""
        return dict(Counter(item.reason for item in self.rejected).most_common())

    def notes(self) -> list[str]:
        """Lines for the user: what is asked, and what was left out and why."""
        families = Counter(sample.family for sample in self.samples)
        counts = ", ".join(f"{name} {count}" for name, count in families.items())
        lines = [f"dataset {self.name}: {len(self.samples)} samples ({counts})"]
        if self.not_chosen:
            lines.append(f"  {self.not_chosen} more were not chosen")
        if self.rejected:
            lines.append(f"  {len(self.rejected)} cannot be used:")
        shown = list(self.reasons().items())[:REASONS_SHOWN]
        return lines + [f"    {count} x {reason}" for reason, count in shown]
