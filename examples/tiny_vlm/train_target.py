"""Stages 2 and 3: train the text model shallow, then grow it to full depth and go on.

Resumable: run the same command again and it continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vllm_vispec.utils.files import writing

from .batching import Batch, stream
from .canvas import CELL, GRID
from .dataset import FAMILY_WEIGHTS, HARD_WEIGHTS
from .model import Target, TargetConfig, grow
from .tokenizer import build_tokenizer, load_tokenizer, save_processor
from .vision_stage import train_vision

# The sibling is half as wide, its vision tower too, which attends to windows in larger images.
# Heads stay 64 wide, as M-RoPE's sections are.
SIZES = {
    "target": TargetConfig(),
    "sibling": TargetConfig(
        hidden=128,
        heads=2,
        kv_heads=1,
        mlp=352,
        vision_depth=2,
        vision_hidden=64,
        vision_heads=2,
        vision_mlp=128,
        vision_window=GRID * CELL,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One training stage; `share` gives its learning-rate progress by steps or by clock."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int
    floor: float
    start_index: int
    weights: dict[str, float]

    def rate(self, progress: float, step: int) -> float:
        """Warm-up, then cosine down to `floor` of the peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return (
            self.lr * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)
        )


class FutureHeads(nn.Module):
    """Training-time helpers: predict tokens t+2 and t+3 from the hidden state of t.

    They make the target's hidden states carry what comes next (a draft reads them)
    and are thrown away afterwards.
    """

    def __init__(self, hidden: int, count: int = 2) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(count))
        for linear in self.maps:
            nn.init.eye_(linear.weight)


@dataclass(frozen=True)
class Loss:
    """Loss to minimise and numbers to show."""

    total: Tensor
    token: float
    content: float


def _next_token_loss(logits: Tensor, gold: Tensor, content: Tensor, weight: float) -> Tensor:
    each = F.cross_entropy(logits.float(), gold, reduction="none")
    scale = 1.0 + (weight - 1.0) * content.float()
    return (each * scale).sum() / scale.sum()


def batch_loss(target: Target, extra: FutureHeads, batch: Batch, args: argparse.Namespace) -> Loss:
    """Weighted next-token loss on answers plus the future-token helpers."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            visual = target.visual(batch.patches) if batch.patches is not None else None
        x = target.embed(batch.ids, visual, batch.image_mask)
        hidden = target.hidden_states(x, batch.positions)
        wanted = batch.answer[:, 1:]
        state, gold = hidden[:, :-1][wanted], batch.ids[:, 1:][wanted]
        content = batch.content[:, 1:][wanted]
        logits = target.lm_head(state)
        total = _next_token_loss(logits, gold, content, args.content_weight)
        for shift, linear in enumerate(extra.maps, start=2):
            keep = batch.answer[:, shift:] & batch.answer[:, 1 : -shift + 1]
            future = target.lm_head(linear(hidden[:, :-shift][keep]))
            total = total + args.future_weight * _next_token_loss(
                future, batch.ids[:, shift:][keep], batch.content[:, shift:][keep], 1.0
            )
    right = logits.detach().argmax(-1) == gold
    return Loss(total, right.float().mean().item(), right[content].float().mean().item())


@dataclass
class Run:
    """Everything that a checkpoint holds."""

    stage: str
    step: int
    seconds: float
    target: Target
    extra: FutureHeads
    optimizer: torch.optim.Optimizer

    def save(self, path: Path) -> None:
        """Atomic write."""
        state = {
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "config": self.target.c.__dict__,
            "target": self.target.state_dict(),
            "extra": self.extra.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with writing(path) as aside:
            torch.save(state, aside)


def make_optimizer(target: Target, extra: FutureHeads) -> torch.optim.Optimizer:
    """AdamW without the (frozen) vision tower; no decay on vectors."""
    named = [(n, p) for n, p in target.named_parameters() if not n.startswith("visual.")]
    params = [p for _, p in named] + list(extra.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def train_stage(run: Run, stage: Stage, args: argparse.Namespace) -> None:
    """Train until `stage.steps` or until the stage's share of minutes is used up."""
    path = args.work_dir / f"{stage.name}.pt"
    tokenizer = load_tokenizer(args.work_dir / "processor")
    data = stream(tokenizer, stage.start_index + run.step * stage.batch, stage.batch, stage.weights)
    budget = 60 * getattr(args, f"{stage.name}_minutes")
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    bar = tqdm(total=stage.steps, initial=run.step, desc=stage.name, mininterval=10)
    mean = {"loss": 0.0, "token": 0.0, "content": 0.0}
    last_save, begin, used, shown_steps = time.time(), time.time(), run.seconds, 0
    while run.step < stage.steps and run.seconds < budget:
        loss = batch_loss(run.target, run.extra, next(data), args)
        loss.total.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        progress = max(run.step / stage.steps, run.seconds / budget)
        for group in run.optimizer.param_groups:
            group["lr"] = stage.rate(progress, run.step)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.seconds = used + time.time() - begin
        shown_steps += 1
        keep = min(0.98, 1 - 1 / shown_steps)
        shown = {"loss": loss.total.item(), "token": loss.token, "content": loss.content}
        mean.update(
            {k: keep * mean[k] + (1 - keep) * v for k, v in shown.items() if not math.isnan(v)}
        )
        bar.set_postfix({k: f"{v:.4f}" for k, v in mean.items()}, refresh=False)
        bar.update()
        if time.time() - last_save > args.save_every:
            run.save(path)
            last_save = time.time()
    run.save(path)
    bar.close()


def load_run(path: Path) -> Run:
    """Restore a stage."""
    state = torch.load(path, weights_only=True)
    target = Target(TargetConfig(**state["config"]))
    target.load_state_dict(state["target"])
    extra = FutureHeads(target.c.hidden)
    extra.load_state_dict(state["extra"])
    optimizer = make_optimizer(target, extra)
    optimizer.load_state_dict(state["optimizer"])
    return Run(state["stage"], state["step"], state["seconds"], target, extra, optimizer)


def vision_stage(args: argparse.Namespace) -> Target:
    """Stage 1, or its saved result."""
    torch.manual_seed(args.seed)
    target = Target(replace(SIZES[args.size], layers=args.shallow_layers))
    path = args.work_dir / "vision.pt"
    if path.exists():
        target.visual.load_state_dict(torch.load(path, weights_only=True))
        return target
    train_vision(target.visual, target.c.hidden, args.vision_steps, 32, 2e-3)
    torch.save(target.visual.state_dict(), path)
    return target


def shallow_stage(args: argparse.Namespace) -> Run:
    """Stage 2: train the shallow model."""
    path = args.work_dir / "shallow.pt"
    if path.exists():
        run = load_run(path)
    else:
        target = vision_stage(args)
        extra = FutureHeads(target.c.hidden)
        run = Run("shallow", 0, 0.0, target, extra, make_optimizer(target, extra))
    stage = Stage("shallow", args.shallow_steps, args.batch, args.lr, 100, 0.2, 0, FAMILY_WEIGHTS)
    train_stage(run, stage, args)
    return run


def deep_stage(args: argparse.Namespace) -> Run:
    """Stage 3: grow to full depth and go on."""
    path = args.work_dir / "deep.pt"
    if path.exists():
        run = load_run(path)
    else:
        shallow = shallow_stage(args)
        target = grow(shallow.target, args.grow)
        run = Run("deep", 0, 0.0, target, shallow.extra, make_optimizer(target, shallow.extra))
    stage = Stage(
        "deep", args.deep_steps, args.batch, args.deep_lr, 50, 0.02, 10_000_000, HARD_WEIGHTS
    )
    train_stage(run, stage, args)
    return run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/tiny_vlm"))
    parser.add_argument("--size", choices=list(SIZES), default="target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vision-steps", type=int, default=420)
    parser.add_argument("--shallow-layers", type=int, default=6)
    parser.add_argument("--shallow-steps", type=int, default=100_000)
    parser.add_argument("--shallow-minutes", type=float, default=26)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--grow", type=int, default=4)
    parser.add_argument("--deep-steps", type=int, default=100_000)
    parser.add_argument("--deep-minutes", type=float, default=31)
    parser.add_argument("--deep-lr", type=float, default=6e-4)
    parser.add_argument("--content-weight", type=float, default=4.0)
    parser.add_argument("--future-weight", type=float, default=0.1)
    parser.add_argument("--save-every", type=float, default=120)
    return parser.parse_args()


def main() -> None:
    """Run all stages that are not finished yet."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not (args.work_dir / "processor" / "tokenizer.json").exists():
        save_processor(build_tokenizer(), args.work_dir / "processor")
    deep_stage(args)


if __name__ == "__main__":
    main()
