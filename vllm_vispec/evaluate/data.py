"""The samples to evaluate on, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.images import image_folder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError


@dataclass(frozen=True)
class EvalSample:
    """A conversation and its tokens."""

    conversation: Conversation
    encoded: Encoded


@dataclass(frozen=True)
class DataSource:
    """A conversation file.

    Attributes:
        path: JSONL (or a JSON array) of conversations.
        image_root: folder of relative image paths; None: the file's own.
        limit: most records to look at; None: all.

    Raises:
        ViSpecError: the file is not there, or `limit` is not at least 1.
    """

    path: Path
    image_root: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ViSpecError(f"--data {self.path} is no file: give a JSONL file of conversations")
        if self.limit is not None and self.limit < 1:
            raise ViSpecError(f"--limit {self.limit} leaves no sample: use at least 1")

    @property
    def images(self) -> Path:
        """Folder that relative image paths start from."""
        return image_folder(self.path, self.image_root)

    def conversations(self) -> Iterator[Conversation | Rejected]:
        """Records in the order of the file, up to the limit."""
        for number, item in enumerate(read_conversations(self.path, self.image_root)):
            if number == self.limit:
                return
            yield item

    def batches(
        self, encoder: Encoder, size: int, rejected: list[Rejected]
    ) -> Iterator[list[EvalSample]]:
        """Groups of up to `size` encoded samples; what is left out goes to `rejected`."""
        group: list[EvalSample] = []
        for item in self.conversations():
            found = item if isinstance(item, Rejected) else encoder(item)
            if isinstance(item, Rejected) or isinstance(found, Rejected):
                rejected.append(found)  # type: ignore[arg-type]
                continue
            group.append(EvalSample(item, found))
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group
