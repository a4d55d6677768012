"""What the serving tests ask, as data, and how an engine answers it."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

from tests.support.engine import greedy
from tests.support.tiny_models import random_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from vllm import LLM

MAX_TOKENS = 24
MAX_MODEL_LEN = 512
Message = dict[str, Any]


def png_of(image: Image) -> bytes:
    """Return the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """Return bytes as the ``data:`` URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def user(text: str, *urls: str) -> list[Message]:
    """Return a chat of one turn with images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def picture(seed: int) -> bytes:
    """Return a small random PNG."""
    return png_of(random_image(seed))


def chats() -> dict[str, list[Message]]:
    """Return the chats of the tests by name."""
    first, second = data_url(picture(1)), data_url(picture(2))
    return {
        "one image": user("What does the picture show?", first),
        "same image": user("How many stars are there?", first),
        "other image": user("What does the picture show?", second),
        "two images": user("Compare both pictures.", first, second),
        "text only": user("Please answer with a JSON object."),
    }


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG that claims to be of this size; its pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1024))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def plain_answers(llm: LLM) -> dict[str, str]:
    """Answer all chats (in the engine's process)."""
    asked = chats()
    outputs = llm.chat(list(asked.values()), greedy(MAX_TOKENS), use_tqdm=False)
    return {name: output.outputs[0].text for name, output in zip(asked, outputs, strict=True)}
