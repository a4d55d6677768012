"""First stage: the tower learns to name what each cell shows, in the language model's own words.

A merged vector should be the sum of the embeddings of the cell's tokens: what an image becomes is
close to text that the language model knows to read. Nothing here concerns drafting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import Canvas
from .state import Run
from .worlds import chart, document, scene, table

# C cells of a batch, W words that images show, D width of the language model.
BLANK_WEIGHT, SCALE = 0.05, 16.0
_MAKERS = ((scene, 5), (document, 4), (chart, 2), (table, 2))


def draw(seed: int) -> Canvas:
    """An image of any kind, decided by its seed."""
    rng = Random(seed)
    maker = rng.choices([m for m, _ in _MAKERS], [w for _, w in _MAKERS])[0]
    return maker(rng).canvas


def cell_tokens(canvas: Canvas, tokenizer: Any) -> list[list[int]]:
    """The tokens of each cell; a text's last cell has what is left over."""
    found: list[list[int]] = [[] for _ in range(canvas.tokens)]
    for mark in canvas.marks:
        for i, token in enumerate(tokenizer.encode(mark.text, add_special_tokens=False)):
            row, col = mark.cells[min(i, len(mark.cells) - 1)]
            found[row * canvas.cols + col].append(token)
    return found


@dataclass(frozen=True)
class CellLoss:
    """Names tokens against all words that images show, and regresses the sum of embeddings."""

    words_W: Tensor
    embeddings_WD: Tensor
    blank: int

    @classmethod
    def make(cls, tokenizer: Any, embeddings: Tensor, images: int = 1500) -> CellLoss:
        """From the words of many images; `embeddings` is the language model's table."""
        seen: set[int] = set()
        for seed in range(images):
            seen.update(*cell_tokens(draw(-1 - seed), tokenizer))
        blank = tokenizer.encode("\n", add_special_tokens=False)[0]
        words = torch.tensor(sorted(seen | {blank}))
        return cls(words, embeddings[words].float(), int((words == blank).nonzero()))

    def __call__(self, visual_CD: Tensor, cells: list[list[int]]) -> tuple[Tensor, float]:
        """The loss, and the share of tokens of filled cells that are among the best words."""
        index = {int(word): i for i, word in enumerate(self.words_W)}
        many_CW = torch.zeros(len(cells), len(self.words_W))
        for row, tokens in enumerate(cells):
            for token in tokens:
                if token in index:
                    many_CW[row, index[token]] += 1
        filled_C = many_CW.sum(1) > 0
        many_CW[~filled_C, self.blank] = 1
        weight_C = torch.where(filled_C, 1.0, BLANK_WEIGHT)
        visual_CD = visual_CD.float()
        middle_D = self.embeddings_WD.mean(0)
        logits_CW = SCALE * (
            F.normalize(visual_CD - middle_D, dim=1)
            @ F.normalize(self.embeddings_WD - middle_D, dim=1).T
        )
        share_CW = many_CW / many_CW.sum(1, keepdim=True)
        naming_C = -(share_CW * logits_CW.log_softmax(1)).sum(1)
        aim_CD = many_CW @ self.embeddings_WD
        distance_C = (visual_CD - aim_CD).square().sum(1) / self.embeddings_WD.square().sum(
            1
        ).mean()
        loss = ((naming_C + distance_C) * weight_C).sum() / weight_C.sum()
        with torch.no_grad():
            count_C = (many_CW > 0).sum(1)
            order = logits_CW[filled_C].argsort(1, descending=True)[:, :8]
            hits = (many_CW[filled_C].gather(1, order) > 0) & (
                torch.arange(order.shape[1])[None] < count_C[filled_C, None]
            )
            right = hits.sum() / count_C[filled_C].sum().clamp(min=1)
        return loss, float(right)


def fold_patches(visual: Any) -> None:
    """Let the tower multiply patches by a matrix: a convolution takes half of a step on a CPU."""
    conv = visual.patch_embed.proj

    def forward(patches: Tensor) -> Tensor:
        return F.linear(patches.to(conv.weight.dtype), conv.weight.flatten(1))

    visual.patch_embed.forward = forward


def batches(seed: int, cells: int) -> Iterator[list[Canvas]]:
    """Endless batches of new images, of about `cells` cells, each from a seed of its own."""
    while True:
        batch: list[Canvas] = []
        while sum(canvas.tokens for canvas in batch) < cells:
            batch.append(draw(seed))
            seed += 1
        yield batch


def train_vision(model: Any, processor: Any, tokenizer: Any, work: Path, minutes: float) -> Run:
    """Train tower and merger; the language model only lends its embeddings."""
    visual = model.model.visual
    fold_patches(visual)
    trained = {f"visual.{name}": p for name, p in visual.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    run = Run(work / "vision.safetensors", trained, optimizer, 60 * minutes)
    if run.done:
        return run
    measure = CellLoss.make(tokenizer, model.model.language_model.embed_tokens.weight.detach())
    data = batches(run.step * 1000, 1200)
    recent: list[tuple[float, float]] = []
    while not run.done:
        batch = next(data)
        inputs = processor(images=[canvas.image for canvas in batch], return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            out = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        loss, right = measure(out, [c for one in batch for c in cell_tokens(one, tokenizer)])
        loss.backward()
        norm = run.update()
        recent.append((loss.item(), right))
        if run.step % 20 == 0:
            mean, share = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            run.log.append({"step": run.step, "loss": mean, "right": share, "norm": norm})
            shown = f"loss {mean:.3f}, right {share:.3f}"
            print(f"vision {run.step}: {run.seconds / 60:.1f} min, {shown}", flush=True)
            recent.clear()
        run.save_sometimes()
    run.save()
    return run
