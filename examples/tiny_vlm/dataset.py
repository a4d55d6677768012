"""Deterministic samples from (split, index), their text form and their token form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from .canvas import GRID, Canvas
from .families import FAMILIES, Dialogue

SPLIT_SEEDS: dict[str, int] = {"train": 1_000_003, "heldout": 7_700_077}
FAMILY_WEIGHTS: dict[str, float] = {
    "general_vqa": 3,
    "text_vqa": 3,
    "captioning": 3,
    "charts": 3,
    "reasoning": 3,
    "multi_turn": 2,
    "text_chat": 1.5,
}
# The last training stage sees the families that learn slowly more often.
HARD_WEIGHTS: dict[str, float] = {
    "general_vqa": 2,
    "text_vqa": 2,
    "captioning": 1.5,
    "charts": 2,
    "reasoning": 6,
    "multi_turn": 3,
    "text_chat": 3,
}
VISUAL_TOKENS = GRID * GRID
IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "You are a helpful assistant."
SLOT = re.compile(r"\{([^{}]*)\}")
PATCH, MERGE = 14, 2
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass(frozen=True)
class Sample:
    """One drawn dialogue."""

    family: str
    dialogue: Dialogue
    canvas: Canvas | None
    system: bool


@dataclass(frozen=True)
class Encoded:
    """Token form: ids, loss mask of answers, mask of image-dependent answer tokens."""

    ids: np.ndarray
    answer: np.ndarray
    content: np.ndarray


def make_sample(
    split: str,
    index: int,
    family: str | None = None,
    weights: dict[str, float] = FAMILY_WEIGHTS,
) -> Sample:
    """The sample with this index; a fixed family or one drawn by weight."""
    rng = Random(SPLIT_SEEDS[split] * 1_000_000_007 + index * 7919)
    drawn = rng.choices(list(weights), weights=list(weights.values()))[0]
    name = family or drawn
    dialogue = FAMILIES[name](rng)
    canvas = dialogue.world.draw() if dialogue.world else None
    return Sample(name, dialogue, canvas, rng.random() < 0.1)


def strip_marks(text: str) -> str:
    """Answer text without the content braces."""
    return SLOT.sub(r"\1", text)


def messages_of(sample: Sample, answered: int = 0) -> list[dict]:
    """Chat messages up to the question of turn `answered` (earlier answers included)."""
    out: list[dict] = []
    for i, turn in enumerate(sample.dialogue.turns[: answered + 1]):
        content: list[dict] = [{"type": "text", "text": turn.question}]
        if i == 0 and sample.canvas is not None:
            content.insert(0, {"type": "image"})
        out.append({"role": "user", "content": content})
        if i < answered:
            text = strip_marks(turn.answer)
            out.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return out


def _segments(sample: Sample) -> list[tuple[str, bool, bool]]:
    """(text, belongs to an answer, depends on the image) pieces in order."""
    out: list[tuple[str, bool, bool]] = []
    if sample.system:
        out.append((f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", False, False))
    for i, turn in enumerate(sample.dialogue.turns):
        image = IMAGE_MARK if i == 0 and sample.canvas is not None else ""
        head = f"<|im_start|>user\n{image}{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        out.append((head, False, False))
        for j, piece in enumerate(SLOT.split(turn.answer)):
            out.append((piece, True, j % 2 == 1))
        out.append(("<|im_end|>", True, False))
        out.append(("\n", False, False))
    return [segment for segment in out if segment[0]]


def encode(sample: Sample, tokenizer: Tokenizer) -> Encoded:
    """Tokenize the whole dialogue once and map the pieces onto tokens."""
    segments = _segments(sample)
    text = "".join(piece for piece, _, _ in segments)
    lengths = [len(piece) for piece, _, _ in segments]
    answer = np.repeat([a for _, a, _ in segments], lengths)
    content = np.repeat([c for _, _, c in segments], lengths)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int64)
    last = np.array([end - 1 for _, end in encoding.offsets])
    repeats = np.where(ids == tokenizer.token_to_id("<|image_pad|>"), VISUAL_TOKENS, 1)
    return Encoded(
        np.repeat(ids, repeats), np.repeat(answer[last], repeats), np.repeat(content[last], repeats)
    )


def patches_of(image: Image.Image) -> np.ndarray:
    """Patches [n, 3*14*14] in the merge-block order of the Qwen image processor (one frame)."""
    pixels = (np.asarray(image, dtype=np.float32) / 255.0 - _MEAN) / _STD
    blocks = pixels.transpose(2, 0, 1).reshape(3, GRID, MERGE, PATCH, GRID, MERGE, PATCH)
    return blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * PATCH * PATCH)


def rope_positions(ids: Sequence[int], image_token: int) -> np.ndarray:
    """M-RoPE positions [3, len] for at most one image of GRID x GRID tokens."""
    mask = np.asarray(ids) == image_token
    n = len(mask)
    out = np.tile(np.arange(n), (3, 1))
    if mask.any():
        a = int(mask.argmax())
        b = a + VISUAL_TOKENS
        cells = np.arange(VISUAL_TOKENS)
        out[:, a:b] = a + np.stack([cells * 0, cells // GRID, cells % GRID])
        out[:, b:] -= VISUAL_TOKENS - GRID
    return out
