"""Batches of training samples, bucketed by length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .canvas import GRID, LABEL_CLASSES, Canvas
from .dataset import Encoded, Sample, encode, make_sample, patches_of, rope_positions

ROUND = 32


@dataclass(frozen=True)
class Batch:
    """A right-padded batch. `images` rows follow the order of the samples that have one."""

    ids: Tensor
    positions: Tensor
    image_mask: Tensor
    answer: Tensor
    content: Tensor
    patches: Tensor | None


def collate(items: list[tuple[Sample, Encoded]], image_token: int, pad_token: int) -> Batch:
    """Pad to a multiple of ROUND."""
    length = -(-max(len(e.ids) for _, e in items) // ROUND) * ROUND
    ids = np.full((len(items), length), pad_token, dtype=np.int64)
    answer = np.zeros((len(items), length), dtype=bool)
    content = np.zeros((len(items), length), dtype=bool)
    for row, (_, e) in enumerate(items):
        ids[row, : len(e.ids)] = e.ids
        answer[row, : len(e.ids)] = e.answer
        content[row, : len(e.ids)] = e.content
    positions = np.stack([rope_positions(row, image_token) for row in ids])
    drawn = [patches_of(s.canvas.image) for s, _ in items if s.canvas is not None]
    patches = torch.from_numpy(np.stack(drawn)).bfloat16() if drawn else None
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(ids == image_token),
        torch.from_numpy(answer),
        torch.from_numpy(content),
        patches,
    )


def stream(
    tokenizer: Tokenizer, start: int, batch: int, weights: dict[str, float], pool: int = 16
) -> Iterator[Batch]:
    """Endless batches of the training split from a sample index on."""
    image, pad = (tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|endoftext|>"))
    index = start
    while True:
        samples = [make_sample("train", index + i, weights=weights) for i in range(batch * pool)]
        items = [(s, encode(s, tokenizer)) for s in samples]
        items.sort(key=lambda item: len(item[1].ids))
        order = list(range(pool))
        Random(index).shuffle(order)
        for k in order:
            yield collate(items[k * batch : (k + 1) * batch], image, pad)
        index += batch * pool


def cell_batch(start: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and per-cell labels (for the vision tower alone), from sample index `start`."""
    canvases: list[Canvas] = []
    index = start
    while len(canvases) < count:
        canvas = make_sample("train", index).canvas
        index += 1
        if canvas is not None:
            canvases.append(canvas)
    patches = torch.from_numpy(np.stack([patches_of(c.image) for c in canvases]))
    labels = {
        name: torch.from_numpy(np.stack([c.labels[name] for c in canvases])).view(-1, GRID * GRID)
        for name in LABEL_CLASSES
    }
    return patches.bfloat16(), labels
