"""What a profile is asked for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.matrix import MAX_DRAFT_TOKENS
from vllm_vispec.bench.profile.probes import find_runner
from vllm_vispec.bench.profile.spans import CLOCKS
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, Record
from vllm_vispec.utils.errors import ViSpecError

EAGLE, VISPEC = "eagle", "vispec"
SIDES = (EAGLE, VISPEC)
AS_THEY_ARE = "native"


def default_runner() -> str:
    """Return the runner that vLLM takes on this machine."""
    return "v2" if has_gpu() else "v1"


@dataclass(frozen=True)
class ProfileSettings(Record):
    """What is profiled, and how. First sentences are the options' help.

    Attributes:
        target: Target: a folder or hub id.
        head: ViSpec head: a folder or hub id.
        data: The dataset's file or folder.
        dataset: How to read --data: mmspec, vispec, openai or tiny.
        eagle_head: Head for vLLM's EAGLE; default: one of --head's sizes.
        num_speculative_tokens: K.
        runner: vLLM's model runner, v1 or v2; default: v2 on a GPU.
        concurrency: Requests that are asked together. Only decoding rounds of so many count.
        repetitions: Of every question, besides a warm-up.
        limit: Most samples; default: all.
        max_tokens: Longest answer; default: the dataset's.
        families: Only these, separated by commas.
        image_tokens: Image tokens of a request, e.g. native,0,256.
        clock: wall, or cpu on a busy machine without a GPU.
        serve: vLLM's options for both engines, one string.
        speculative_config: More for ViSpec's draft, e.g. '{"draft_vocab": 4096}'.

    Raises:
        ViSpecError: a value is unknown or impossible.
    """

    target: str
    head: str
    data: str
    dataset: str = "openai"
    eagle_head: str | None = None
    num_speculative_tokens: int = 4
    runner: str = field(default_factory=default_runner)
    concurrency: int = 1
    repetitions: int = 3
    limit: int | None = None
    max_tokens: int | None = None
    families: tuple[str, ...] = ()
    image_tokens: tuple[int, ...] = (IMAGES_AS_THEY_ARE,)
    clock: str = "wall"
    serve: str = ""
    speculative_config: str = ""

    def __post_init__(self) -> None:
        find_runner(self.runner)
        if self.clock not in CLOCKS:
            raise ViSpecError(f"--clock {self.clock} is unknown: choose from {', '.join(CLOCKS)}")
        _at_least_one("--concurrency", self.concurrency)
        _at_least_one("--repetitions", self.repetitions)
        if not 1 <= self.num_speculative_tokens <= MAX_DRAFT_TOKENS:
            raise ViSpecError(f"-k {self.num_speculative_tokens}: give 1 to {MAX_DRAFT_TOKENS}")
        for tokens in self.image_tokens:
            if tokens < IMAGES_AS_THEY_ARE:
                raise ViSpecError(f"--image-tokens {tokens}: give {AS_THEY_ARE}, 0 or more")
        # Read here so that a mistake shows at once.
        _ = self.serve_args, self.draft_settings
        if not self.image_tokens:
            raise ViSpecError(f"--image-tokens is empty: give {AS_THEY_ARE} or numbers")

    @property
    def serve_args(self) -> tuple[str, ...]:
        """Return vLLM's options one by one.

        Raises:
            ViSpecError: a quote is not closed.
        """
        try:
            return tuple(shlex.split(self.serve))
        except ValueError as error:
            raise ViSpecError(f"--serve {self.serve}: {error}") from error

    @property
    def draft_settings(self) -> dict[str, Any]:
        """Return further settings of ViSpec's draft.

        Raises:
            ViSpecError: they are no JSON object.
        """
        try:
            return dict(json.loads(self.speculative_config or "{}"))
        except (ValueError, TypeError) as error:
            raise ViSpecError(
                f"--speculative-config {self.speculative_config} is no JSON object ({error})"
            ) from error

    def command(self, output: Path) -> str:
        """Return what a user types to measure this."""
        words = ["vispec", "bench", "profile", *self._options(), "--output", str(output)]
        return shlex.join(words)

    def _options(self) -> Iterator[str]:
        # The runner's default depends on the machine.
        required = ("target", "head", "data", "runner", "num_speculative_tokens")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in required or value != one.default:
                yield f"--{one.name.replace('_', '-')}"
                yield _as_text(value)


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(AS_THEY_ARE if item == IMAGES_AS_THEY_ARE else str(item) for item in value)
    return str(value)


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise ViSpecError(f"{flag} {value}: give at least 1")
