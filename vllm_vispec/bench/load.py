"""The load on a server: `vllm bench serve` with questions of our own.

Questions go in as ready chat messages, images as data URLs, through vLLM's dataset "custom". Its
tokenizer is left out (`--skip-tokenizer-init`): the server's own counts of tokens are used.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.schema import BenchSample, Request
from vllm_vispec.errors import ViSpecError

CHAT = "/v1/chat/completions"
_DIGITS = 6
_RESULT_LISTS = (
    "generated_texts",
    "output_lens",
    "input_lens",
    "ttfts",
    "latencies",
    "itls",
    "errors",
)


class LoadError(ViSpecError):
    """A load that could not be made, or whose result cannot be read."""


@dataclass(frozen=True)
class LoadJob:
    """One run of the load generator.

    Attributes:
        url: the server's address.
        model: the name it serves.
        samples: what to ask, in order.
        questions: file made by `write_questions` from these samples.
        concurrency: requests in flight.
        temperature: 0 is greedy.
        result: JSON file to write.
        extra: further fields of every request.
        timeout_s: longest run.
    """

    url: str
    model: str
    samples: tuple[BenchSample, ...]
    questions: Path
    concurrency: int
    temperature: float
    result: Path
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    timeout_s: float = 7200.0

    def arguments(self) -> list[str]:
        """Return what follows `vllm` on the command line."""
        options = {
            "--backend": "openai-chat",
            "--base-url": self.url,
            "--endpoint": CHAT,
            "--model": self.model,
            "--dataset-name": "custom",
            "--dataset-path": str(self.questions),
            "--num-prompts": str(len(self.samples)),
            "--max-concurrency": str(self.concurrency),
            "--temperature": f"{self.temperature:g}",
            "--extra-body": json.dumps(self._body()),
            # Whoever asks has seen the server answer; a test request would count as load.
            "--ready-check-timeout-sec": "0",
            "--result-dir": str(self.result.parent),
            "--result-filename": self.result.name,
        }
        flags = ["--skip-tokenizer-init", "--disable-shuffle", "--no-oversample", "--disable-tqdm"]
        flags += ["--save-result", "--save-detailed"]
        return ["bench", "serve", *(part for pair in options.items() for part in pair), *flags]

    @property
    def command(self) -> str:
        """What a user types to make this load."""
        return shlex.join(["vllm", *self.arguments()])

    def _body(self) -> dict[str, Any]:
        return {
            # vLLM's dataset has one limit for all requests.
            "max_completion_tokens": max(sample.max_tokens for sample in self.samples),
            # So that texts differ wherever tokens do.
            "skip_special_tokens": False,
            **self.extra,
        }


@dataclass(frozen=True)
class LoadResult:
    """What a load came to: its requests in order, and the seconds it took."""

    requests: tuple[Request, ...]
    wall_s: float


def write_questions(samples: Sequence[BenchSample], file: Path) -> None:
    """Write samples as a dataset file for `vllm bench serve`.

    Raises:
        ViSpecError: an image is missing or broken.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with part.open("w", encoding="utf-8") as target:
        for sample in samples:
            target.write(json.dumps({"prompt": chat_messages(sample)}) + "\n")
    part.replace(file)


def chat_messages(sample: BenchSample) -> list[dict[str, Any]]:
    """Return a sample as OpenAI messages with images as data URLs.

    Raises:
        ViSpecError: an image is missing or broken.
    """
    from vllm_vispec.conversations.images import BadImage
    from vllm_vispec.regenerate.backends.server import to_openai

    try:
        return to_openai(sample.turns, Path("/"))
    except BadImage as error:
        raise ViSpecError(
            f"sample {sample.sample_id}: {error}; mend the dataset or leave the sample out"
        ) from error


def read_result(file: Path, samples: Sequence[BenchSample]) -> LoadResult:
    """Read the detailed JSON of `vllm bench serve`.

    Raises:
        LoadError: it is missing, or not what this version of the package knows.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        columns = [content[name] for name in _RESULT_LISTS]
        rows = list(zip(samples, *columns, strict=True))
        wall_s = float(content["duration"])
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"the result of vllm bench serve cannot be read: {error!r}") from error
    return LoadResult(tuple(_request(*row) for row in rows), wall_s)


def _request(
    sample: BenchSample,
    text: str,
    output_tokens: int,
    prompt_tokens: int,
    ttft_s: float,
    e2e_s: float,
    itl_s: Sequence[float],
    error: str,
) -> Request:
    return Request(
        sample_id=sample.sample_id,
        family=sample.family,
        output_text=text,
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        ttft_s=round(ttft_s, _DIGITS),
        e2e_s=round(e2e_s, _DIGITS),
        # The stream opens with an empty chunk that names the role, sent along with the first
        # token's; the gap between these two is no time between tokens.
        itl_s=tuple(round(gap, _DIGITS) for gap in itl_s[1:]),
        # vLLM keeps a traceback; its last line says what happened.
        error=error.strip().splitlines()[-1] if error.strip() else None,
    )
