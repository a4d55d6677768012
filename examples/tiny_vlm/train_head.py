"""Distil the ViSpec head from the frozen target, with multi-step rollouts. Resumable."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .draft import Draft, DraftConfig, head_config, save_head
from .export import MAX_POSITIONS, load_target
from .head_data import HeadBatch, Record, batches, collect
from .model import Target
from .tokenizer import load_tokenizer

HERE = Path(__file__).parent
TRAIN_START = 20_000_000


def rollout_loss(
    target: Target, draft: Draft, batch: HeadBatch, args: argparse.Namespace
) -> tuple[Tensor, list[float]]:
    """Soft cross-entropy plus smooth L1 on features over all passes; accuracy per pass."""
    total, hits = torch.zeros(()), []
    with torch.autocast("cpu", torch.bfloat16):
        outs = draft(batch.rows, args.passes)
        for spec, (out, wanted) in enumerate(zip(outs, batch.wanted, strict=True)):
            state, truth = out[wanted], batch.next_hidden[wanted]
            with torch.no_grad():
                goal = target.lm_head(truth).float().softmax(-1)
            logits = target.lm_head(state).float()
            soft = -(goal * logits.log_softmax(-1)).sum(-1).mean()
            feature = F.smooth_l1_loss(state.float(), truth.float())
            total = total + args.decay**spec * (soft + args.feature_weight * feature)
            right = logits.detach().argmax(-1) == batch.gold[wanted]
            hits.append(right.float().mean().item())
    return total, hits


@dataclass
class HeadRun:
    """State of the head's training."""

    draft: Draft
    optimizer: torch.optim.Optimizer
    step: int
    seconds: float

    def save(self, path: Path) -> None:
        state = {
            "draft": self.draft.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def start_run(target: Target, path: Path, lr: float) -> HeadRun:
    """New or resumed run; the embedding table is the target's and stays frozen."""
    torch.manual_seed(0)
    draft = Draft(DraftConfig.of(target.c))
    draft.embed_tokens.weight.data.copy_(target.embed_tokens.weight)
    draft.embed_tokens.weight.requires_grad_(False)
    params = [p for p in draft.parameters() if p.requires_grad]
    run = HeadRun(draft, torch.optim.AdamW(params, lr=lr, weight_decay=0.01, fused=True), 0, 0.0)
    if path.exists():
        state = torch.load(path, weights_only=True)
        draft.load_state_dict(state["draft"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds = state["step"], state["seconds"]
    return run


def train(target: Target, records: list[Record], args: argparse.Namespace) -> Draft:
    """Train until the minutes are used up."""
    path = args.work_dir / "head.pt"
    run = start_run(target, path, args.lr)
    table = run.draft.embed_tokens.weight.detach().bfloat16()
    data = batches(records, table, args.passes, args.batch, seed=run.step)
    budget, used, begin, saved = 60 * args.minutes, run.seconds, time.time(), time.time()
    params = [p for p in run.draft.parameters() if p.requires_grad]
    bar = tqdm(desc="head", initial=run.step, mininterval=10)
    mean: list[float] = []
    while run.seconds < budget:
        loss, hits = rollout_loss(target, run.draft, next(data), args)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        shape = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * run.seconds / budget))
        run.optimizer.param_groups[0]["lr"] = args.lr * min(1, (run.step + 1) / 50) * shape
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step, run.seconds = run.step + 1, used + time.time() - begin
        mean = [0.97 * m + 0.03 * h for m, h in zip(mean or hits, hits, strict=True)]
        text = "/".join(f"{m:.3f}" for m in mean)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=text, refresh=False)
        bar.update()
        if time.time() - saved > args.save_every:
            run.save(path)
            saved = time.time()
    run.save(path)
    bar.close()
    return run.draft


def cached_records(target: Target, args: argparse.Namespace) -> list[Record]:
    """Records of the training split, from the cache file when there is one."""
    path = args.work_dir / "head_records.pt"
    if path.exists():
        return [Record(*fields) for fields in torch.load(path, weights_only=True)]
    tokenizer = load_tokenizer(args.target)
    records = collect(target, tokenizer, "train", TRAIN_START, args.samples)
    torch.save([tuple(r.__dict__.values()) for r in records], path)
    print(f"{len(records)} of {args.samples} dialogues are the target's own greedy answers")
    return records


def export_head(target: Target, draft: Draft, args: argparse.Namespace) -> None:
    """Save the head with its config."""
    tokenizer = load_tokenizer(args.target)
    ids = {
        "bos": tokenizer.token_to_id("<|endoftext|>"),
        "eos": tokenizer.token_to_id("<|im_end|>"),
    }
    save_head(draft, args.output, head_config(draft.c, MAX_POSITIONS, ids))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/tiny_vlm"))
    parser.add_argument("--target", type=Path, default=HERE / "checkpoints" / "target")
    parser.add_argument("--output", type=Path, default=HERE / "checkpoints" / "vispec_head")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--feature-weight", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=120)
    return parser.parse_args()


def main() -> None:
    """Observe the target, train the head and save it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    target = load_target(args.target)
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    export_head(target, train(target, cached_records(target, args), args), args)


if __name__ == "__main__":
    main()
