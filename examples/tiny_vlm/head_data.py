"""Training data of the head: hidden states of the frozen target on its own greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from .batching import collate
from .dataset import Encoded, Sample, encode, make_sample
from .draft import Rows
from .model import Target


@dataclass(frozen=True)
class Record:
    """One dialogue seen by the target (no padding)."""

    ids: Tensor
    hidden: Tensor
    answer: Tensor
    visual: Tensor | None
    image_start: int
    family: str


@dataclass(frozen=True)
class HeadBatch:
    """Draft rows with, per kept row, the token and hidden state it must produce.

    `wanted[s]` marks the rows that count in pass s.
    """

    rows: Rows
    gold: Tensor
    next_hidden: Tensor
    wanted: tuple[Tensor, ...]


@torch.inference_mode()
def observe(
    target: Target,
    tokenizer: Tokenizer,
    items: Sequence[tuple[Sample, Encoded]],
    only_greedy: bool = True,
) -> list[Record]:
    """Run the target; by default keep dialogues whose answer is exactly its greedy one."""
    image, pad = (tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|endoftext|>"))
    batch = collate(list(items), image, pad)
    visual = target.visual(batch.patches) if batch.patches is not None else None
    x = target.embed(batch.ids, visual, batch.image_mask)
    hidden = target.hidden_states(x, batch.positions)
    wrong = target.lm_head(hidden[:, :-1]).argmax(-1) != batch.ids[:, 1:]
    greedy = ~(wrong & batch.answer[:, 1:]).any(1)
    out, seen = [], 0
    for row, (sample, encoded) in enumerate(items):
        n, has_image = len(encoded.ids), sample.canvas is not None
        picture = visual[seen].clone() if has_image and visual is not None else None
        seen += has_image
        if only_greedy and not greedy[row]:
            continue
        start = int((encoded.ids == image).argmax()) if has_image else -1
        ids, answer = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.answer)
        out.append(Record(ids, hidden[row, :n].clone(), answer, picture, start, sample.family))
    return out


def collect(
    target: Target, tokenizer: Tokenizer, split: str, start: int, count: int, batch: int = 16
) -> list[Record]:
    """Records of `count` samples (fewer: those the target does not reproduce are dropped)."""
    records: list[Record] = []
    pool = 8 * batch
    for begin in tqdm(range(start, start + count, pool), desc=f"observe {split}", mininterval=5):
        drawn = [make_sample(split, i) for i in range(begin, min(begin + pool, start + count))]
        items = [(s, encode(s, tokenizer)) for s in drawn]
        items.sort(key=lambda item: len(item[1].ids))
        for i in range(0, len(drawn), batch):
            records += observe(target, tokenizer, items[i : i + batch])
    return records


def _kept_rows(record: Record) -> Tensor:
    """Row indices that survive compression (the image leaves one row)."""
    n = len(record.ids) - 1
    if record.visual is None:
        return torch.arange(n)
    a, b = record.image_start, record.image_start + len(record.visual)
    return torch.cat([torch.arange(a - 1), torch.arange(b - 2, n)])


def _wanted(record: Record, kept: Tensor, spec: int) -> Tensor:
    """Rows of pass `spec`: the token two ahead and the start of the chain lie in the answer."""
    answer = F.pad(record.answer, (0, 2))
    begin = (kept - spec + 1).clamp(min=0)
    return answer[kept + 2] & answer[begin]


def pack(records: Sequence[Record], table: Tensor, passes: int) -> HeadBatch:
    """Pad a list of records into draft rows."""
    kept = [_kept_rows(r) for r in records]
    width = -(-max(len(k) for k in kept) // 16) * 16

    def pad(rows: list[Tensor]) -> Tensor:
        return torch.stack(
            [torch.cat([r, r.new_zeros(width - len(r), *r.shape[1:])]) for r in rows]
        )

    ends = [r.image_start + (0 if r.visual is None else len(r.visual)) for r in records]
    pictures = [r.visual for r in records if r.visual is not None]
    rows = Rows(
        hidden=pad([r.hidden[k] for r, k in zip(records, kept, strict=True)]),
        embed=pad([table[r.ids[k + 1]] for r, k in zip(records, kept, strict=True)]),
        positions=pad(kept),
        compact=pad([k == e - 2 if e > 0 else k < 0 for k, e in zip(kept, ends, strict=True)]),
        after=pad([k >= e - 1 if e > 0 else k < 0 for k, e in zip(kept, ends, strict=True)]),
        visual=torch.stack(pictures) if pictures else None,
        images=torch.tensor([r.visual is not None for r in records]),
    )
    return HeadBatch(
        rows,
        gold=pad([F.pad(r.ids, (0, 1))[k + 2] for r, k in zip(records, kept, strict=True)]),
        next_hidden=pad([r.hidden[k + 1] for r, k in zip(records, kept, strict=True)]),
        wanted=tuple(
            pad([_wanted(r, k, s) for r, k in zip(records, kept, strict=True)])
            for s in range(passes)
        ),
    )


def batches(
    records: list[Record], table: Tensor, passes: int, batch: int, seed: int
) -> Iterator[HeadBatch]:
    """Endless shuffled batches, bucketed by length."""
    rng = Random(seed)
    while True:
        pool = rng.sample(records, min(len(records), 16 * batch))
        pool.sort(key=lambda r: len(r.ids))
        starts = list(range(0, len(pool) - batch + 1, batch))
        rng.shuffle(starts)
        for start in starts:
            yield pack(pool[start : start + batch], table, passes)
