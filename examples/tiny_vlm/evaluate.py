"""Exact match on held-out images, per family, with the image and with a blank image."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from .canvas import Canvas
from .dataset import Sample, encode, make_sample, patches_of
from .decode import Specials, generate
from .export import load_target
from .families import FAMILIES
from .model import Target
from .scoring import Score, score_answer
from .tokenizer import load_tokenizer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Judge:
    """A target, its tokenizer, and how to prompt it."""

    target: Target
    tokenizer: Tokenizer

    @property
    def special(self) -> Specials:
        names = ("<|image_pad|>", "<|endoftext|>", "<|im_end|>")
        return Specials(*(self.tokenizer.token_to_id(name) for name in names))

    def prompt(self, sample: Sample) -> np.ndarray:
        """Token ids up to the last answer (earlier turns keep their reference answers)."""
        encoded = encode(sample, self.tokenizer)
        inside = encoded.answer.astype(int)
        return encoded.ids[: int(np.flatnonzero(np.diff(inside) == 1)[-1]) + 1]

    def token_answers(self, samples: list[Sample], blank: bool) -> list[list[int]]:
        """Greedy answers as token ids."""
        images = [
            Canvas().image if blank else s.canvas.image for s in samples if s.canvas is not None
        ]
        patches = None
        if images:
            patches = torch.from_numpy(np.stack([patches_of(i) for i in images])).bfloat16()
        prompts = [self.prompt(s) for s in samples]
        return generate(self.target, prompts, patches, self.special)

    def answers(self, samples: list[Sample], blank: bool) -> list[str]:
        """Greedy answers as text."""
        rows = self.token_answers(samples, blank)
        return [self.tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def evaluate(judge: Judge, count: int, batch: int, blank: bool) -> dict[str, Score]:
    """Scores per family."""
    scores = {name: Score() for name in FAMILIES}
    todo = [(name, start) for name in FAMILIES for start in range(0, count, batch)]
    for name, start in tqdm(todo, desc="blank" if blank else "held-out", mininterval=5):
        size = min(batch, count - start)
        samples = [make_sample("heldout", start + i, name) for i in range(size)]
        for sample, answer in zip(samples, judge.answers(samples, blank), strict=True):
            scores[name].add(score_answer(sample.dialogue.turns[-1].answer, answer))
    return scores


def report(scores: dict[str, Score]) -> dict:
    """Per family, and over the families that have an image."""
    visual = Score()
    for name, score in scores.items():
        if name != "text_chat":
            visual.add(score)
    per_family = {name: score.as_dict() for name, score in scores.items()}
    return {"image_families": visual.as_dict(), "per_family": per_family}


def main() -> None:
    """Evaluate an exported target and merge the numbers into RESULTS.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "checkpoints" / "target")
    parser.add_argument("--count", type=int, default=64, help="samples per family")
    parser.add_argument("--blank-count", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.time()
    judge = Judge(load_target(args.model), load_tokenizer(args.model))
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results["target"] = {
        "split": "heldout",
        "decoding": "greedy, bf16 weights, bf16 activations",
        "samples_per_family": args.count,
        "parameters": sum(p.numel() for p in judge.target.parameters()),
        "text_layers": judge.target.c.layers,
        "with_image": report(evaluate(judge, args.count, args.batch, blank=False)),
        "blank_samples_per_family": args.blank_count,
        "blank_image": report(evaluate(judge, args.blank_count, args.batch, blank=True)),
        "seconds": round(time.time() - begin),
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["target"], indent=2))


if __name__ == "__main__":
    main()
