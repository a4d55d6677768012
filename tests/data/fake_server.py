"""A small OpenAI-compatible server in this process that answers like a tiny target might."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from vllm_vispec.data.template import ChatTemplate

ANSWER = "A red square."


@dataclass
class FakeServer:
    """What the server knows and what it saw. ``template`` None: it tells no token ids.

    ``meeting`` makes requests wait for each other, which only concurrent ones survive. After
    ``refuse_after`` answers connections are cut without a word.
    """

    template: ChatTemplate | None = None
    models: tuple[str, ...] = ("served",)
    meeting: threading.Barrier | None = None
    refuse_after: int = -1
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[list[tuple[int, int]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and content for a chat request."""
        with self.lock:
            self.requests.append(body)
            if 0 <= self.refuse_after < len(self.requests):
                raise ConnectionError
        if self.meeting is not None:
            self.meeting.wait(timeout=30)
        images = [_decode(part) for part in _parts(body, "image_url")]
        self.sizes.append([image.size for image in images])
        if any("too long" in part["text"] for part in _parts(body, "text")):
            return 400, {"error": {"message": "prompt is too long", "code": 400}}
        return 200, self._completion(body, images)

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


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [
                {"id": name, "object": "model", "created": 1, "owned_by": "me"}
                for name in fake.models
            ]
            self._send(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._send(*fake.complete(body))
            except ConnectionError:
                self.close_connection = True

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    return Handler


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """Serve on a free port while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
