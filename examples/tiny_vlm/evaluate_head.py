"""Simulated greedy chain acceptance of the head on the target's own held-out answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .dataset import Encoded, Sample, make_sample
from .draft import Draft, load_head
from .evaluate import HERE, Judge
from .export import load_target
from .families import FAMILIES
from .head_data import Record, observe, pack
from .model import Target
from .tokenizer import load_tokenizer

HELDOUT_START = 500_000


def own_answers(judge: Judge, samples: list[Sample]) -> list[tuple[Sample, Encoded]]:
    """Prompts followed by the target's greedy answers (right or wrong)."""
    items = []
    for sample, ids in zip(samples, judge.token_answers(samples, blank=False), strict=True):
        prompt = judge.prompt(sample)
        full = np.concatenate([prompt, ids, [judge.special.stop]]).astype(np.int64)
        answer = np.arange(len(full)) >= len(prompt)
        items.append((sample, Encoded(full, answer, answer)))
    return items


def heldout_records(judge: Judge, per_family: int) -> list[Record]:
    """Hidden states of the target on its own answers; `per_family` dialogues of every family."""
    records: list[Record] = []
    for name in tqdm(FAMILIES, desc="held-out answers"):
        samples = [make_sample("heldout", HELDOUT_START + i, name) for i in range(per_family)]
        items = own_answers(judge, samples)
        records += observe(judge.target, judge.tokenizer, items, only_greedy=False)
    return records


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


def main() -> None:
    """Measure and merge the numbers into RESULTS.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=HERE / "checkpoints" / "target")
    parser.add_argument("--head", type=Path, default=HERE / "checkpoints" / "vispec_head")
    parser.add_argument("--count", type=int, default=16, help="dialogues per family")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = Judge(load_target(args.target), load_tokenizer(args.target))
    head = load_head(args.head)
    records = heldout_records(judge, args.count)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results["vispec_head"] = {
        "parameters": sum(p.numel() for p in head.parameters()),
        "heldout_dialogues": len(records),
        "decoding": "greedy chains on the target's own greedy answers, simulated, bf16",
        "chains": {f"K={k}": simulate(judge.target, head, records, k) for k in args.depths},
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    overall = {k: v["overall"] for k, v in results["vispec_head"]["chains"].items()}
    print(json.dumps(overall, indent=2))


if __name__ == "__main__":
    main()
