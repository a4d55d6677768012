"""Batched KV-cache decoding of the lean target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dataset import rope_positions
from .model import Target


@dataclass(frozen=True)
class Specials:
    """Token ids that decoding needs."""

    image: int
    pad: int
    stop: int


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch."""

    ids: Tensor
    positions: Tensor
    real: Tensor


def left_pad(prompts: Sequence[np.ndarray], special: Specials) -> Prompts:
    """Pad on the left; padded columns are masked out."""
    width = max(len(p) for p in prompts)
    ids = np.full((len(prompts), width), special.pad, dtype=np.int64)
    positions = np.zeros((len(prompts), 3, width), dtype=np.int64)
    real = np.zeros((len(prompts), width), dtype=bool)
    for row, prompt in enumerate(prompts):
        begin = width - len(prompt)
        ids[row, begin:] = prompt
        positions[row, :, begin:] = rope_positions(prompt, special.image)
        real[row, begin:] = True
    return Prompts(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(real))


def _mask(real: Tensor, queries: int) -> Tensor:
    """Additive mask [B, 1, queries, keys]: causal and without padding."""
    keys = real.shape[1]
    ok = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & real[:, None, None, :]
    return torch.where(ok, 0.0, -1e9).bfloat16()


def _pick(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]


@torch.inference_mode()
def generate(
    target: Target,
    prompts: Sequence[np.ndarray],
    patches: Tensor | None,
    special: Specials,
    max_new: int = 200,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Answers (without the stop token). `patches` holds the images of prompts that have one."""
    batch = left_pad(prompts, special)
    visual = target.visual(patches) if patches is not None else None
    x = target.embed(batch.ids, visual, batch.ids == special.image)
    caches: list[list[Tensor]] = [[] for _ in target.layers]
    real, step = batch.real, batch.positions
    out, done = [], torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new):
        cos, sin = target.rope(step)
        mask = _mask(real, x.shape[1])
        for layer, cache in zip(target.layers, caches, strict=True):
            x = layer(x, cos, sin, cache, mask)
        token = _pick(target.lm_head(target.norm(x[:, -1])), temperature)
        out.append(torch.where(done, special.stop, token))
        done = done | (token == special.stop)
        if done.all():
            break
        x = target.embed_tokens(token[:, None]).bfloat16()
        step = step[:, :, -1:].amax(1, keepdim=True).expand(-1, 3, -1) + 1
        real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
    rows = torch.stack(out, dim=1).tolist()
    return [row[: row.index(special.stop)] if special.stop in row else row for row in rows]
