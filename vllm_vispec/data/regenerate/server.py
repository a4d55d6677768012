"""A running `vllm serve` (or another OpenAI-compatible server), asked many questions at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import islice
from typing import Any

from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.regenerate.dialogue import Answer, Dialogue, Regenerated, Result
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.template import load_processor, to_openai
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError, first_line

RETRIES = 3
TIMEOUT_S = 3600.0
"""A long answer behind a long queue is slow, not lost."""


class ServerBackend:
    """Sends each dialogue's turns to a server; ``concurrency`` dialogues at a time."""

    def __init__(self, settings: RegenerateSettings) -> None:
        from openai import AsyncOpenAI

        self.settings = settings
        base = settings.server.rstrip("/").removesuffix("/v1") + "/v1"
        self.client = AsyncOpenAI(
            base_url=base, api_key="none", max_retries=RETRIES, timeout=TIMEOUT_S
        )
        self.runner = asyncio.Runner()
        self.model = self.runner.run(self._served_model())
        self.encoder: Encoder | None = None
        if settings.target:
            processor = load_processor(settings.target, settings.image_bounds)
            self.encoder = Encoder(processor, image_root=settings.images_from, recorded=False)

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Result]:
        """See `Backend.answer`."""
        results = self._results(conversations)
        try:
            while (result := self.runner.run(anext(results, None))) is not None:
                yield result
        finally:
            self.runner.run(results.aclose())

    def close(self) -> None:
        """Close the connections."""
        self.runner.run(self.client.close())
        self.runner.close()

    async def _results(self, conversations: Iterable[Conversation]) -> AsyncGenerator[Result, None]:
        waiting, running = iter(conversations), set[asyncio.Task[Result]]()
        try:
            while True:
                free = self.settings.concurrency - len(running)
                started = islice(waiting, free)
                running |= {asyncio.create_task(self._dialogue(one)) for one in started}
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                # A lost connection comes last, so that nothing finished is lost.
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _served_model(self) -> str:
        """Return the name of the model to ask for.

        Raises:
            ViSpecError: nobody answers, or the server has several models and none is the target.
        """
        from openai import OpenAIError

        try:
            names = [model.id for model in (await self.client.models.list()).data]
        except OpenAIError as error:
            raise self._no_server(error) from error
        if self.settings.target in names:
            return self.settings.target
        if len(names) == 1:
            return names[0]
        raise ViSpecError(
            f"--server {self.settings.server} serves {', '.join(names) or 'nothing'}; give one of "
            "these names as --target"
        )

    def _no_server(self, error: Exception) -> ViSpecError:
        return ViSpecError(
            f"--server {self.settings.server} does not answer ({first_line(error)}); start vllm "
            "serve and run the same command again"
        )

    async def _dialogue(self, conversation: Conversation) -> Result:
        """Have all questions of a dialogue answered.

        Raises:
            ViSpecError: the connection is lost, or the server reads images in other sizes.
        """
        from openai import APIConnectionError, APIStatusError

        template = self.encoder.template if self.encoder else None
        try:
            dialogue = Dialogue.begin(conversation, self.settings.request)
            is_finished = False
            while not is_finished:
                # Images are read and text is rendered beside the requests that are on their way.
                request = await asyncio.to_thread(self._request, dialogue)
                response = await self.client.chat.completions.create(**request)
                is_finished = dialogue.accept(to_answer(response), template)
            done = await asyncio.to_thread(dialogue.finish, self.encoder)
            await asyncio.to_thread(self._check_sizes, done)
            return done
        except APIConnectionError as error:
            raise self._no_server(error) from error
        except ViSpecError:
            raise
        except APIStatusError as error:
            return Rejected(conversation.sample_id, f"the server refuses: {first_line(error)}")
        except ValueError as error:
            return Rejected(conversation.sample_id, first_line(error))

    def _check_sizes(self, done: Regenerated) -> None:
        """Refuse a server with other image bounds; by default it takes none from a request.

        Raises:
            ViSpecError: says how to start it.
        """
        prompt, bounds = done.answers[-1].prompt_token_ids, self.settings.image_bounds
        if done.round_trip is not False or self.encoder is None or prompt is None or not bounds:
            return
        encoded = self.encoder(done.conversation)
        if isinstance(encoded, Rejected):
            return
        ours = sum(end - start for start, end in encoded.runs)
        theirs = prompt.count(self.encoder.image_token_id)
        if ours != theirs:
            raise ViSpecError(
                f"--server {self.settings.server} reads the images of "
                f"{done.conversation.sample_id} as {theirs} tokens, not as {ours}: start it with "
                f"--mm-processor-kwargs '{json.dumps(bounds)}', or give its bounds as --min-pixels "
                "and --max-pixels"
            )

    def _request(self, dialogue: Dialogue) -> dict[str, Any]:
        settings = self.settings
        extra: dict[str, Any] = {
            "return_token_ids": True,
            # The model's own defaults would change the distribution that is sampled.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if self.encoder is not None:
            text = self.encoder.template.render(dialogue.turns, open_answer=True)
            extra["add_special_tokens"] = self.encoder.template.adds_special_tokens(text)
        return {
            "model": self.model,
            "messages": to_openai(dialogue.turns, settings.images_from),
            "temperature": settings.temperature_of(dialogue.source.sample_id),
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": settings.seed_of(dialogue.source.sample_id, len(dialogue.answers)),
            "extra_body": extra,
        }


def to_answer(response: Any) -> Answer:
    """Return a chat completion as an answer, with token ids if the server tells them.

    Raises:
        ValueError: the response holds no answer.
    """
    if not response.choices:
        raise ValueError("empty answer")
    choice = response.choices[0]
    told = (getattr(choice, "token_ids", None), getattr(response, "prompt_token_ids", None))
    ids, prompt_ids = (None if one is None else tuple(one) for one in told)
    return Answer(choice.message.content or "", str(choice.finish_reason), ids, prompt_ids)
