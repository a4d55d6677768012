"""Stage 1: train the vision tower with a linear classifier of every visual token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .batching import cell_batch
from .canvas import IGNORE, LABEL_CLASSES
from .model import Vision

EMPTY_WEIGHT = 0.1


class CellHeads(nn.Module):
    """One linear classifier per label."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({n: nn.Linear(hidden, k) for n, k in LABEL_CLASSES.items()})

    def forward(self, visual: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Summed cross-entropy and the accuracy on non-empty cells."""
        loss, right, seen = torch.zeros(()), 0, 0
        for name, head in self.heads.items():
            logits, target = head(visual.float()).flatten(0, 1), labels[name].flatten()
            weight = torch.ones(LABEL_CLASSES[name])
            if name not in ("row", "col"):
                weight[0] = EMPTY_WEIGHT
            loss = loss + F.cross_entropy(logits, target, weight=weight, ignore_index=IGNORE)
            full = target > 0
            right += int((logits.argmax(-1) == target)[full].sum())
            seen += int(full.sum())
        return loss, right / max(seen, 1)


def train_vision(vision: Vision, hidden: int, steps: int, batch: int, lr: float) -> float:
    """Train in place; returns the accuracy over the last steps."""
    heads = CellHeads(hidden)
    params = [*vision.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    smooth, bar = 0.0, tqdm(range(steps), desc="vision", mininterval=5)
    for step in bar:
        patches, labels = cell_batch(step * batch * 2, batch)
        with torch.autocast("cpu", torch.bfloat16):
            visual = vision(patches)
        loss, accuracy = heads(visual, labels)
        # keep the scale of visual tokens close to that of word embeddings
        scale = visual.float().pow(2).mean().sqrt()
        (loss + 0.1 * (scale - 0.5).pow(2)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = accuracy if step == 0 else 0.98 * smooth + 0.02 * accuracy
        bar.set_postfix(loss=f"{loss.item():.3f}", cells=f"{smooth:.4f}", scale=f"{scale:.2f}")
    return smooth
