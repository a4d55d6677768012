"""An OpenAI-compatible server without a network that answers like a tiny target might."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from vllm_vispec.data.template import ChatTemplate

ANSWER = "A red square."


@dataclass
class FakeServer:
    """What the server knows and what it saw. ``template`` None: it tells no token ids.

    ``meeting`` makes requests wait for each other, which only concurrent ones survive. After
    ``refuse_after`` answers there is no connection any more.
    """

    template: ChatTemplate | None = None
    models: tuple[str, ...] = ("served",)
    meeting: asyncio.Barrier | None = None
    refuse_after: int = -1
    requests: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[list[tuple[int, int]]] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Take the network's place for OpenAI's client."""
        network = httpx.AsyncClient(transport=httpx.MockTransport(self._respond))
        client = functools.partial(openai.AsyncOpenAI, http_client=network)
        patch.setattr(openai, "AsyncOpenAI", client)

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            common = {"object": "model", "created": 1, "owned_by": "me"}
            models = [{"id": name} | common for name in self.models]
            return httpx.Response(200, json={"object": "list", "data": models})
        assert request.url.path == "/v1/chat/completions"
        body = json.loads(request.content)
        self.requests.append(body)
        if 0 <= self.refuse_after < len(self.requests):
            raise httpx.ConnectError("gone", request=request)
        if self.meeting is not None:
            await asyncio.wait_for(self.meeting.wait(), 30)
        images = [_decode(part) for part in _parts(body, "image_url")]
        self.sizes.append([image.size for image in images])
        if any("too long" in part["text"] for part in _parts(body, "text")):
            return httpx.Response(400, json={"error": {"message": "prompt is too long"}})
        return httpx.Response(200, json=self._completion(body, images))

    def _completion(self, body: dict[str, Any], images: list[Image.Image]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": ANSWER},
        }
        response = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        if self.template is not None:
            tokenizer = self.template.tokenizer
            ids = tokenizer(ANSWER, add_special_tokens=False).input_ids
            choice["token_ids"] = [*ids, tokenizer.eos_token_id]
            text = self.template.processor.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
            encoded = self.template.processor(text=[text], images=images or None)
            response["prompt_token_ids"] = list(encoded.input_ids[0])
        return response | {"choices": [choice]}


def _parts(body: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [part for turn in body["messages"] for part in turn["content"] if part["type"] == kind]


def _decode(part: dict[str, Any]) -> Image.Image:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
