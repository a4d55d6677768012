"""The offline engine: `vllm.LLM` in this process, kept full while answers come back one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.images import open_image
from vllm_vispec.data.regenerate.dialogue import Answer, Dialogue, Result
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.engine_start import spelled_as_json, starting_engine
from vllm_vispec.utils.errors import first_line

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

QUEUE_FACTOR = 2
"""Dialogues in the engine per sequence that it runs: the rest waits there, already prepared."""


class OfflineBackend:
    """Runs every dialogue's turns through one engine; new dialogues join while others run."""

    def __init__(self, settings: RegenerateSettings) -> None:
        self.settings = settings
        processor = load_processor(settings.target, settings.image_bounds)
        self.encoder = Encoder(processor, image_root=settings.images_from, recorded=False)
        self.llm = start_engine(settings)
        self.limit = QUEUE_FACTOR * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Result]:
        """See `Backend.answer`."""
        waiting, running = iter(conversations), dict[str, Dialogue]()
        while True:
            started = list(islice(waiting, self.limit - len(running)))
            if not started and not running:
                return
            for conversation in started:
                try:
                    dialogue = Dialogue.begin(conversation, self.settings.request)
                    running[self._enqueue(dialogue)] = dialogue
                except ValueError as error:
                    yield Rejected(conversation.sample_id, first_line(error))
            if running:  # without a request the engine's process never answers
                yield from self._step(running)

    def close(self) -> None:
        """Stop the engine."""
        self.llm.llm_engine.engine_core.shutdown()

    def _step(self, running: dict[str, Dialogue]) -> Iterator[Result]:
        """Let the engine make a token for everybody and look at who is finished."""
        for output in self.llm.llm_engine.step():
            if not output.finished:
                continue
            dialogue = running.pop(output.request_id)
            try:
                if dialogue.accept(to_answer(output), self.encoder.template):
                    yield dialogue.finish(self.encoder)
                else:
                    running[self._enqueue(dialogue)] = dialogue
            except ValueError as error:
                yield Rejected(dialogue.source.sample_id, first_line(error))

    def _enqueue(self, dialogue: Dialogue) -> str:
        """Hand the current question to the engine; return the request's id in its outputs.

        Raises:
            ValueError: an image is bad, or the prompt does not fit the engine.
        """
        prompt: dict[str, Any] = {"prompt_token_ids": self.encoder.prompt_ids(dialogue.turns)}
        images = [open_image(path, self.settings.images_from) for path in dialogue.images]
        if images:
            prompt["multi_modal_data"] = {"image": images}
        from vllm.exceptions import VLLMClientError

        params = sampling_params(self.settings, dialogue)
        try:
            (request,) = self.llm.enqueue([prompt], params, use_tqdm=False)
        except VLLMClientError as error:  # e.g. a prompt longer than the context; no ValueError
            raise ValueError(str(error)) from error
        # The engine appends "-" and a random suffix inside; outputs carry the id without it.
        return str(request).partition("-")[0]


def start_engine(settings: RegenerateSettings) -> LLM:
    """Start `vllm.LLM` for a job.

    Raises:
        ViSpecError: it does not start, with the cause.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {"dtype": settings.dtype, "seed": settings.seed}
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    engine = dict(settings.engine)
    if settings.image_bounds:
        more = engine.pop("mm_processor_kwargs", {})
        arguments["mm_processor_kwargs"] = {**more, **settings.image_bounds}
    with starting_engine(settings.target, spelled_as_json("--engine")):
        if current_platform.is_cpu():
            arguments |= cpu_arguments(settings)
        return LLM(**({"model": settings.target} | arguments | engine))


def cpu_arguments(settings: RegenerateSettings) -> dict[str, Any]:
    """Return what vLLM's CPU runner needs for seeds of single requests.

    When a prompt is split, the V1 runner turns the request's generator back by an offset, which
    CPU generators do not have. So no prompt may be split.
    """
    from vllm.engine.arg_utils import EngineArgs

    length = settings.max_model_len or settings.engine.get("max_model_len")
    if length is None:
        config = EngineArgs(model=settings.target, dtype=settings.dtype).create_model_config()
        length = config.max_model_len
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(int(length), 2048)}


def sampling_params(settings: RegenerateSettings, dialogue: Dialogue) -> SamplingParams:
    """Return the sampling parameters of a dialogue's current answer."""
    from vllm import SamplingParams

    temperature = settings.temperature_of(dialogue.source.sample_id)
    greedy = temperature == 0
    return SamplingParams(
        temperature=temperature,
        top_p=1.0 if greedy else settings.top_p,
        max_tokens=settings.max_tokens,
        seed=None if greedy else settings.seed_of(dialogue.source.sample_id, len(dialogue.answers)),
    )


def to_answer(output: RequestOutput) -> Answer:
    """Return a finished request as an answer."""
    first = output.outputs[0]
    return Answer(
        text=first.text,
        finish_reason=str(first.finish_reason),
        token_ids=tuple(first.token_ids),
        prompt_token_ids=tuple(output.prompt_token_ids or ()),
    )
