"""Distil the ViSpec head from the frozen target, with multi-step rollouts. Resumable."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .draft import Draft, DraftConfig, head_config, load_head, save_head
from .export import MAX_POSITIONS, load_target
from .head_data import HeadBatch, Record, batches, collect, pack
from .model import Target
from .tokenizer import load_tokenizer

HERE = Path(__file__).parent
TRAIN_START = 20_000_000
HELDOUT_START = 500_000


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


@torch.inference_mode()
def chain_rounds(right: Tensor, answer_rows: list[int], depth: int) -> tuple[int, int, list[int]]:
    """Replay greedy chain rounds; `right[s, row]`: draft token s+1 of the chain ending at row.

    Returns rounds, answer tokens after the first, and how often each depth was accepted.
    """
    row, last, rounds = answer_rows[0], answer_rows[-1], 0
    accepted = [0] * depth
    while row <= last:
        a = 0
        while a < depth and row + a <= last and bool(right[a, row + a]):
            accepted[a] += 1
            a += 1
        rounds += 1
        row += a + 1
    return rounds, len(answer_rows), accepted


@torch.inference_mode()
def simulate(target: Target, draft: Draft, records: list[Record], depth: int) -> dict:
    """Tokens per round of greedy chains of `depth` draft tokens on held-out dialogues."""
    table = draft.embed_tokens.weight
    stats: dict[str, list] = {}
    for record in records:
        batch = pack([record], table, depth)
        outs = draft(batch.rows, depth)
        right = torch.stack([target.lm_head(o[0]).argmax(-1) == batch.gold[0] for o in outs])
        rows = torch.nonzero(batch.wanted[0][0])[:, 0].tolist()
        cut = next((i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), None)
        rows = rows if cut is None else rows[cut:]
        rounds, tokens, accepted = chain_rounds(right, rows, depth)
        for name in (record.family, "overall"):
            old = stats.setdefault(name, [0, 0, [0] * depth])
            stats[name] = [
                old[0] + rounds,
                old[1] + tokens,
                [x + y for x, y in zip(old[2], accepted, strict=True)],
            ]
    return {
        name: {
            "tokens_per_round": round(tokens / rounds, 3),
            "accept_rate_by_depth": [round(x / rounds, 3) for x in accepted],
        }
        for name, (rounds, tokens, accepted) in sorted(stats.items())
    }


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


def finish(target: Target, draft: Draft, args: argparse.Namespace) -> None:
    """Save the head and record its simulated acceptance."""
    tokenizer = load_tokenizer(args.target)
    ids = {
        "bos": tokenizer.token_to_id("<|endoftext|>"),
        "eos": tokenizer.token_to_id("<|im_end|>"),
    }
    save_head(draft, args.output, head_config(draft.c, MAX_POSITIONS, ids))
    heldout = collect(target, tokenizer, "heldout", HELDOUT_START, args.heldout)
    head = load_head(args.output)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    results["vispec_head"] = {
        "parameters": sum(p.numel() for p in head.parameters()),
        "heldout_dialogues": len(heldout),
        "decoding": "greedy chains, simulated, bf16",
        "chains": {f"K={k}": simulate(target, head, heldout, k) for k in args.depths},
    }
    args.results.write_text(json.dumps(results, indent=2) + "\n")
    overall = {k: v["overall"] for k, v in results["vispec_head"]["chains"].items()}
    print(json.dumps(overall, indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/tiny_vlm"))
    parser.add_argument("--target", type=Path, default=HERE / "checkpoints" / "target")
    parser.add_argument("--output", type=Path, default=HERE / "checkpoints" / "vispec_head")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.json")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--heldout", type=int, default=192)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--feature-weight", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=120)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    return parser.parse_args()


def main() -> None:
    """Observe the target, train the head, save it and measure it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    target = load_target(args.target)
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    finish(target, train(target, cached_records(target, args), args), args)


if __name__ == "__main__":
    main()
