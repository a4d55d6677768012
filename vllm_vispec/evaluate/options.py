"""What to evaluate, and the samples to evaluate on, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from vllm_vispec.config import read_images
from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.image_bounds import NAMES
from vllm_vispec.data.images import image_folder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.shards import exists
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.settings import Settings


class EvalOptions(Settings):
    """What to evaluate, and how: the options of `vispec eval`."""

    target: str = Field(description="Target: a folder or hub id.")
    head: str = Field(description="Draft: a head or a published model, folder or hub id.")
    data: Path = Field(
        description="JSONL of conversations whose answers are the target's own greedy ones, e.g. "
        "from `vispec regenerate --temperature 0`."
    )
    image_root: Path | None = Field(
        default=None, description="Folder of relative image paths; default: that of --data."
    )
    num_speculative_tokens: int = Field(
        default=5,
        ge=1,
        description="Draft tokens per step (K).",
        json_schema_extra={"flags": ["--num-speculative-tokens", "-k"]},
    )
    limit: int | None = Field(default=None, ge=1, description="Look at the first records only.")
    engine: bool = Field(
        default=False, description="Measure the same questions with the engine, too."
    )
    engine_args: dict[str, Any] = Field(
        default={}, description="JSON object of further vllm.LLM settings for --engine."
    )
    check_greedy: bool = Field(
        default=False, description="Report how many answer tokens are the target's greedy choice."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="float32, bfloat16 or float16; auto: the target's own, as in vllm serve.",
    )
    device: str | None = Field(
        default=None, description="Where to simulate; default: a GPU if there is one."
    )
    batch_size: int = Field(default=4, ge=1, description="Conversations at once.")
    max_length: int = Field(
        default=4096, ge=1, description="Longest conversation in tokens; longer ones are left out."
    )
    min_pixels: int = Field(
        default=0, ge=0, description="Of images; 0: as the draft was trained, else as --data is."
    )
    max_pixels: int = Field(
        default=0, ge=0, description="Of images; 0: as the draft was trained, else as --data is."
    )
    images: str | None = Field(
        default=None,
        description="What a published model sees of images: all, none, prune:N or pool:N; default: "
        "all it can.",
    )
    draft_vocab: str | None = Field(
        default=None,
        description="Tokens that may be drafted: a list, auto, or how many; default: all.",
    )

    @field_validator("data")
    @classmethod
    def _is_there(cls, path: Path) -> Path:
        if not exists(path):
            raise ValueError(f"--data {path} is no file: give a JSONL file of conversations")
        return path

    @field_validator("images")
    @classmethod
    def _has_meaning(cls, images: str | None) -> str | None:
        read_images(images, "--images ")
        return images

    @property
    def image_folder(self) -> Path:
        """Folder that relative image paths start from."""
        return image_folder(self.data, self.image_root)

    @property
    def draft_vocab_setting(self) -> str | int | None:
        """The draft vocabulary as the speculative config takes it."""
        text = self.draft_vocab
        return int(text) if text is not None and text.isdigit() else text

    def summary(self) -> dict[str, Any]:
        """The part of the report that says what was evaluated."""
        names = ("target", "head", "data", "dtype", "num_speculative_tokens")
        found = self.model_dump(mode="json") | {"draft_vocab": self.draft_vocab_setting}
        return {n: found[n] for n in (*names, *NAMES, "images", "draft_vocab") if found[n]}


@dataclass(frozen=True)
class EvalSample:
    """A conversation and its tokens."""

    conversation: Conversation
    encoded: Encoded


def read_samples(
    path: Path, encoder: Encoder, rejected: list[Rejected], limit: int | None = None
) -> Iterator[EvalSample]:
    """Yield the conversations of a file, encoded; what is left out goes to `rejected`.

    Args:
        path: JSONL (or a JSON array) of conversations.
        limit: most records to look at; None: all.
    """
    for item in islice(read_conversations(path, encoder.image_root), limit):
        found = item if isinstance(item, Rejected) else encoder(item)
        if isinstance(found, Rejected):
            rejected.append(found)
        else:
            assert isinstance(item, Conversation)
            yield EvalSample(item, found)
