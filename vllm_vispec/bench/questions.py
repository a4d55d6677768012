"""What the cells of a run ask: made once per number of image tokens, the same for all sides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_vispec.bench.follow_up import Ask, ask_server, with_answers
from vllm_vispec.bench.images import TokensOf, samples_for, tokens_of_target
from vllm_vispec.bench.load import write_questions
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.run_folder import read_samples, write_samples
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.bench.server import BenchServer, option_value
from vllm_vispec.errors import ViSpecError


class QuestionStore:
    """Prepares samples and keeps them in the run's folder, for later calls too.

    Raises:
        ViSpecError: there are no samples, or their images cannot have the wanted numbers of tokens.
    """

    def __init__(
        self, settings: MatrixSettings, samples: Sequence[BenchSample], folder: Path
    ) -> None:
        if not samples:
            raise ViSpecError(f"--dataset {settings.dataset} has no samples: choose another")
        self._settings, self._folder = settings, folder
        self._sized = {
            tokens: samples_for(samples, tokens, self._tokens_of, folder / "images")
            for tokens in settings.image_tokens
        }
        self._ready: dict[int, tuple[BenchSample, ...]] = {}

    def questions(
        self, image_tokens: int, helper: BenchServer, limit: int
    ) -> tuple[tuple[BenchSample, ...], Path]:
        """Return samples and the file from which `vllm bench serve` asks them.

        Args:
            helper: server that gives the earlier answers of dialogues that lack them.
            limit: most samples; a smaller limit gives the first of those of a larger one.

        Raises:
            ViSpecError: an image cannot be read, or the server does not answer.
        """
        ask = ask_server(helper.url, self._settings.target)
        samples = self._samples(image_tokens, limit, ask)
        name = f"image_tokens_{image_tokens}-first_{len(samples)}.jsonl"
        file = self._folder / "questions" / name
        if not file.exists():
            write_questions(samples, file)
        return samples, file

    def _samples(self, image_tokens: int, limit: int, ask: Ask) -> tuple[BenchSample, ...]:
        """Return the first samples; earlier answers are asked for when they are needed first."""
        file = self._folder / "samples" / f"image_tokens_{image_tokens}.jsonl"
        ready = self._ready.get(image_tokens) or read_samples(file) or ()
        wanted = self._sized[image_tokens][:limit]
        if len(ready) < len(wanted):
            ready = (*ready, *with_answers(wanted[len(ready) :], ask))
            write_samples(file, ready)
        self._ready[image_tokens] = ready
        return ready[:limit]

    def _tokens_of(self, side: int) -> int:
        return self._counter(side)

    @cached_property
    def _counter(self) -> TokensOf:
        given = option_value(self._settings.serve_args, "--mm-processor-kwargs") or "{}"
        try:
            options = TypeAdapter(dict[str, Any]).validate_json(given)
        except ValidationError as error:
            raise ViSpecError(f"--mm-processor-kwargs {given} is no JSON object") from error
        return tokens_of_target(self._settings.target, options)
