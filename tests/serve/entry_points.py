"""Child-process job: the engine behind `vllm serve`, used directly."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.serve import chats
from tests.support import engine


def stream_all(model: str, head: str, num_draft_tokens: int) -> dict[str, Any]:
    """Stream the answers of all text-only and one-image requests from an ``AsyncLLM`` at once.

    Returns ids by request, without and with the head, and the drafts of the latter.
    """
    engine.prepare_process()
    engine.register_plugin()
    plain = asyncio.run(_answers(engine.EngineOptions(model=model)))
    engine.shut_down_distributed()
    options = engine.EngineOptions(model=model, draft=head, num_draft_tokens=num_draft_tokens)
    found = asyncio.run(_answers(options))
    return {"plain": plain["ids"], "found": found["ids"], "accepted": found["accepted"]}


async def _answers(options: engine.EngineOptions) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    running = AsyncLLM.from_engine_args(AsyncEngineArgs(**options.llm_kwargs()))
    try:
        outputs = await asyncio.gather(
            *(_answer(running, name, prompt) for name, prompt in _prompts().items())
        )
    finally:
        running.shutdown()
    accepted = sum(sum(item.accepted_draft) for item in outputs)
    return {"ids": [item.token_ids for item in outputs], "accepted": accepted}


async def _answer(running: Any, name: str, prompt: Any) -> engine.Completion:
    params = engine.greedy(chats.MAX_TOKENS)
    outputs = [output async for output in running.generate(prompt, params, request_id=name)]
    # Each output of a stream holds all tokens so far.
    return engine.completions(outputs[-1])[0]


def _prompts() -> dict[str, Any]:
    from tests.support.tiny_configs import FAMILIES
    from tests.support.tiny_models import random_image

    image = FAMILIES["qwen2_5_vl"].image_prompt
    with_image = {"prompt": f"{image} What is it?", "multi_modal_data": {"image": random_image(1)}}
    return {"text": {"prompt": "Please count to ten."}, "image": with_image}
