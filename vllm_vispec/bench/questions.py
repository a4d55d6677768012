"""What the cells of a run ask: made once per number of image tokens, the same for all variants."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vllm_vispec.bench.datasets import with_square_images, without_images
from vllm_vispec.bench.load import CHAT, chat_messages
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchSample
from vllm_vispec.bench.server import BenchServer, call, option_value
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_text

TIMEOUT_S = 3600.0
SIZES_PX = range(4, 4097, 4)
USUAL_TOKEN_PX = 28
"""Side of what a token stands for in most targets; decides between sizes that are equally good."""
TOLERANCE = 0.1
"""Share by which an image may miss the wanted number of tokens: sizes come in steps."""

AskTarget = Callable[[BenchSample], str]
"""Returns the greedy answer to the last question of a sample."""
TokensOf = Callable[[int], int]
"""Tokens of a square image by its side in pixels."""


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
        self, image_tokens: int, server: BenchServer, limit: int
    ) -> tuple[tuple[BenchSample, ...], Path]:
        """Return samples and the file from which `vllm bench serve` asks them.

        Args:
            server: gives the earlier answers of dialogues that lack them, once.
            limit: most samples; a smaller limit gives the first of those of a larger one.

        Raises:
            ViSpecError: an image cannot be read, or the server does not answer.
        """
        name, wanted = f"image_tokens_{image_tokens}", self._sized[image_tokens][:limit]
        answered = self._folder / "samples" / f"{name}.jsonl"
        lines = answered.read_text(encoding="utf-8").splitlines() if answered.exists() else []
        ready = [BenchSample.from_json(json.loads(line)) for line in lines]
        if len(ready) < len(wanted):
            ask = ask_server(server.url, self._settings.target)
            ready += with_answers(wanted[len(ready) :], ask)
            lines = [json.dumps(one.to_json(), ensure_ascii=False) for one in ready]
            write_text(answered, "\n".join(lines) + "\n")
        file = self._folder / "questions" / f"{name}-first_{len(wanted)}.jsonl"
        if not file.exists():
            asked = [json.dumps({"prompt": chat_messages(one)}) for one in ready[: len(wanted)]]
            write_text(file, "\n".join(asked) + "\n")
        return tuple(ready[: len(wanted)]), file

    @cached_property
    def _tokens_of(self) -> TokensOf:
        return tokens_of_target(self._settings.target, self._settings.serve_args)


def samples_for(
    samples: Sequence[BenchSample], image_tokens: int, tokens_of: TokensOf, folder: Path
) -> tuple[BenchSample, ...]:
    """Return the samples of a cell.

    With a number of tokens, 0 included, those samples are asked that have images, so that cells
    with different numbers ask the same. Their images become squares that share the tokens evenly.

    Args:
        image_tokens: of each request, or `IMAGES_AS_THEY_ARE`.
        folder: gets the resized images.

    Raises:
        ViSpecError: no sample has an image, or the target cannot be given that many tokens.
    """
    if image_tokens == IMAGES_AS_THEY_ARE:
        return tuple(samples)
    chosen = [sample for sample in samples if sample.images]
    if not chosen:
        raise ViSpecError(
            f"--image-tokens {image_tokens}: no sample of the dataset has an image; leave the "
            "option out"
        )
    if image_tokens == 0:
        return tuple(without_images(sample) for sample in chosen)
    side_for = cache(lambda tokens: find_side(tokens, tokens_of))
    return tuple(
        with_square_images(sample, side, folder)
        for sample in chosen
        for side in [side_for(image_tokens // len(sample.images))]
    )


def find_side(tokens: int, tokens_of: TokensOf) -> int:
    """Return the side of a square image that has this many tokens, as nearly as sizes allow.

    Raises:
        ViSpecError: no size comes near.
    """
    usual = USUAL_TOKEN_PX * tokens**0.5
    best = min(SIZES_PX, key=lambda side: (abs(tokens_of(side) - tokens), abs(side - usual)))
    if abs(tokens_of(best) - tokens) > TOLERANCE * tokens:
        raise ViSpecError(
            f"--image-tokens: the target gives an image {tokens_of(best)} tokens where {tokens} "
            'are wanted; leave the option out, or widen its limits with --serve "--mm-processor-'
            'kwargs ..." (Qwen: min_pixels, max_pixels)'
        )
    return best


def tokens_of_target(target: str, serve_args: Sequence[str]) -> TokensOf:
    """Return how many tokens a target's processor gives to square images.

    Args:
        serve_args: vLLM's options; `--mm-processor-kwargs` counts.

    Raises:
        ViSpecError: that option is no JSON object, or the target has no processor that tells.
    """
    from vllm_vispec.data.template import load_processor

    given = option_value(serve_args, "--mm-processor-kwargs") or "{}"
    try:
        options: Mapping[str, Any] = dict(json.loads(given))
    except (TypeError, ValueError) as error:
        raise ViSpecError(f"--mm-processor-kwargs {given} is no JSON object") from error
    count = getattr(load_processor(target), "_get_num_multimodal_tokens", None)
    if count is None:
        raise ViSpecError(
            f"--image-tokens: the processor of {target} does not tell how many tokens an image "
            "has; leave the option out"
        )

    @cache
    def tokens_of(side: int) -> int:
        return int(count(image_sizes=[(side, side)], **options)["num_image_tokens"][0])

    return tokens_of


def with_answers(samples: Sequence[BenchSample], ask: AskTarget) -> tuple[BenchSample, ...]:
    """Return the samples with an answer of the target between any two questions."""

    def answered(sample: BenchSample) -> BenchSample:
        turns: list[Turn] = []
        for turn in sample.turns:
            if turns and turns[-1].role == turn.role == "user":
                text = ask(replace(sample, turns=tuple(turns)))
                turns.append(Turn("assistant", (Part(text=text),)))
            turns.append(turn)
        return replace(sample, turns=tuple(turns))

    return tuple(answered(sample) if sample.follow_up else sample for sample in samples)


def ask_server(url: str, model: str) -> AskTarget:
    """Return a function that asks a running server, one question at a time.

    Raises:
        ViSpecError: (the function) the server refuses or is gone.
    """

    def ask(sample: BenchSample) -> str:
        body = {
            "model": model,
            "messages": chat_messages(sample),
            "temperature": 0,
            "max_completion_tokens": sample.max_tokens,
        }
        try:
            answer = call(url + CHAT, json.dumps(body).encode(), TIMEOUT_S)
        except OSError as error:
            raise ViSpecError(
                f"sample {sample.sample_id}: its earlier questions get no answer ({error})"
            ) from error
        return str(json.loads(answer)["choices"][0]["message"]["content"] or "")

    return ask
