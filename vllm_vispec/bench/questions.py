"""What the cells of a run ask: made once per number of image tokens, the same for all sides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_vispec.bench.follow_up import ask_server, with_answers
from vllm_vispec.bench.images import TokensOf, samples_for, tokens_of_target
from vllm_vispec.bench.load import write_questions
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.bench.server import BenchServer, option_value
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_text


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
            tokens: samples_for(
                samples, tokens, lambda side: self._tokens_of(side), folder / "images"
            )
            for tokens in settings.image_tokens
        }

    def questions(
        self, image_tokens: int, helper: BenchServer, limit: int
    ) -> tuple[tuple[BenchSample, ...], Path]:
        """Return samples and the file from which `vllm bench serve` asks them.

        Args:
            helper: server that gives the earlier answers of dialogues that lack them, once.
            limit: most samples; a smaller limit gives the first of those of a larger one.

        Raises:
            ViSpecError: an image cannot be read, or the server does not answer.
        """
        name, wanted = f"image_tokens_{image_tokens}", self._sized[image_tokens][:limit]
        answered = self._folder / "samples" / f"{name}.jsonl"
        lines = answered.read_text(encoding="utf-8").splitlines() if answered.exists() else []
        ready = [BenchSample.from_json(json.loads(line)) for line in lines]
        if len(ready) < len(wanted):
            ask = ask_server(helper.url, self._settings.target)
            ready += with_answers(wanted[len(ready) :], ask)
            lines = [json.dumps(one.to_json(), ensure_ascii=False) for one in ready]
            write_text(answered, "\n".join(lines) + "\n")
        file = self._folder / "questions" / f"{name}-first_{len(wanted)}.jsonl"
        if not file.exists():
            write_questions(ready[: len(wanted)], file)
        return tuple(ready[: len(wanted)]), file

    @cached_property
    def _tokens_of(self) -> TokensOf:
        given = option_value(self._settings.serve_args, "--mm-processor-kwargs") or "{}"
        try:
            options = TypeAdapter(dict[str, Any]).validate_json(given)
        except ValidationError as error:
            raise ViSpecError(f"--mm-processor-kwargs {given} is no JSON object") from error
        return tokens_of_target(self._settings.target, options)
