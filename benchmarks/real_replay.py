"""Acceptance of heads on the real pair without an engine, and what they gain from the image.

Greedy chains are replayed over the target's own greedy answers, with the functions of `vispec
eval`. A head reads each answer three times: with its image, with the image of another sample of the
same kind of prompt, and with a blank one. Only the draft is shown these: answers, and the target's
states of text, stay those of the true image.

Tensor names end in their shape: S passes, B samples, T tokens of an answer after its first, L rows,
D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.calls import Call, acceptance_length, acceptance_rate_per_position, estimate
from benchmarks.study import HELD_OUT, Study, Trained
from examples.real_vlm.words import names_content
from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.schema import Record
from vllm_vispec.utils.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_vispec.data.encode import Encoded
    from vllm_vispec.train.target import Observed, TrainingTarget

DRAFT_TOKENS = (3, 5, 7)
VIEWS = ("present", "swapped", "blanked")
LOSSES = ("present - swapped", "present - blanked")
CLASSES = ("content", "other")
"""Tokens that name what the image shows, and all others."""
REPLAYED, ALL = "replayed", "all kinds"
BATCH_SIZE, MAX_LENGTH = 8, 4096
GREY = 2 * 225 / 255 - 1
"""Light grey as the target's processor scales pixels."""


@dataclass(frozen=True)
class Replay(Record):
    """One answer of the target, and a head's chains over it.

    Attributes:
        family: the kind of prompt.
        accepted: accepted draft tokens of every step, for each of `DRAFT_TOKENS`.
        counts: for each of `VIEWS`, of `CLASSES` and draft position, how many tokens were drafted
            right there behind right ones only, and how many were drafted.
    """

    family: str
    accepted: list[list[int]]
    counts: list[list[list[list[int]]]]


def with_images(one: Observed, other: Observed) -> Observed:
    """Return a sample that shows another one's images to a draft, stretched to as many tokens.

    Its tokens stay, and all that rows of text read: embeddings of text, and the state at the token
    before it, be that the last one of an image.
    """
    import torch

    embeds_LD, hidden_LD = one.embeds_LD.clone(), one.hidden_LD.clone()
    for (start, end), (first, last) in zip(one.runs, cycle(other.runs), strict=False):
        rows = first + torch.arange(end - start) * (last - first) // (end - start)
        embeds_LD[start:end] = other.embeds_LD[rows]
        hidden_LD[start : end - 1] = other.hidden_LD[rows[:-1]]
    return replace(one, embeds_LD=embeds_LD, hidden_LD=hidden_LD)


def swap_images(samples: Sequence[Observed]) -> list[Observed]:
    """Return samples that show the images of the next one of their family, the last the first's."""
    following: dict[int, Observed] = {}
    for family in {one.family for one in samples}:
        group = [one for one in samples if one.family == family]
        following |= {id(group[i - 1]): one for i, one in enumerate(group)}
    return [with_images(one, following[id(one)]) for one in samples]


def observe(
    target: TrainingTarget, samples: Sequence[Encoded], blank: bool = False
) -> Iterator[Observed]:
    """What the target computes for samples, or for them with grey images of the same sizes."""
    import torch

    for first in range(0, len(samples), BATCH_SIZE):
        part = list(samples[first : first + BATCH_SIZE])
        for place, one in enumerate(part):
            if blank and one.runs:
                grey = torch.full_like(one.vision["pixel_values"], GREY)
                part[place] = replace(one, vision={**one.vision, "pixel_values": grey})
        for seen in target.observe(part):
            yield replace(seen, vision={})  # no draft here reads pixels


def replay_heads(study: Study, heads: Sequence[Trained]) -> None:
    """Replay the held-out answers with every head that has no result yet.

    Raises:
        ViSpecError: the target, a head or the data cannot be used.
    """
    missing = [one for one in heads if not study.result(REPLAYED, one).is_file()]
    if not missing:
        return
    import torch

    from vllm_vispec.data.encode import Encoder
    from vllm_vispec.data.template import load_processor
    from vllm_vispec.evaluate.options import read_samples
    from vllm_vispec.heads.target import target_dtype
    from vllm_vispec.train.target import TrainingTarget

    torch.set_num_threads(study.threads)
    folder, processor = study.questions(HELD_OUT), load_processor(study.target)
    dtype = getattr(torch, target_dtype(study.target))  # as it is served
    target = TrainingTarget.load(study.target, dtype, "cpu")
    encoder = Encoder(processor, MAX_LENGTH, folder)
    encoded = [one.encoded for one in read_samples(folder / "answers.jsonl", encoder, [])]
    observed = list(observe(target, encoded))
    blank = observe(target, encoded, blank=True)
    blanked = [with_images(one, other) for one, other in zip(observed, blank, strict=True)]
    views = (observed, swap_images(observed), blanked)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    shows = {one["id"]: set(one["shows"]) for one in map(json.loads, lines)}
    for trained in missing:
        found = replay_head(study.head(trained), target, views, shows, processor.tokenizer)
        write_json(study.result(REPLAYED, trained), [one.to_json() for one in found])
        print(f"replayed: {trained.name}", flush=True)


def replay_head(
    head: Path,
    target: TrainingTarget,
    views: Sequence[Sequence[Observed]],
    shows: Mapping[str, Collection[str]],
    tokenizer: Any,
) -> Iterator[Replay]:
    """Yield every answer of every sample, with the head's own draft vocabulary if it has one.

    Args:
        views: the samples in each of `VIEWS`.
        shows: words of their images, by sample.
    """
    import torch

    from vllm_vispec.draft_vocab.files import find_vocab
    from vllm_vispec.heads.folder import DRAFT_VOCAB, load_draft
    from vllm_vispec.train.acceptance import answer_spans, draft_tokens
    from vllm_vispec.train.target import pad_batch

    draft, lm_head_VD, token_ids_V = load_draft(head), target.lm_head_VD, None
    draft = draft.to(lm_head_VD.dtype).eval()
    if (head / DRAFT_VOCAB).is_file():
        vocab = find_vocab("auto", head, len(lm_head_VD))
        token_ids_V = torch.tensor(sorted(vocab.token_ids if vocab else ()))
        lm_head_VD = lm_head_VD[token_ids_V]
    for first in range(0, len(views[0]), BATCH_SIZE):
        parts = [view[first : first + BATCH_SIZE] for view in views]
        with torch.inference_mode():
            drafted = [
                draft_tokens(draft, lm_head_VD, pad_batch(part), DRAFT_TOKENS[-1], token_ids_V)
                for part in parts
            ]
        for number, one in enumerate(parts[0]):
            rows = [tokens_SBL[:, number, : len(one.token_ids)] for tokens_SBL in drafted]
            for span in answer_spans(one.answer.tolist()):
                pieces = [
                    tokenizer.decode([token]) for token in one.token_ids[slice(*span)].tolist()
                ]
                named = names_content(pieces, shows[one.sample_id] if one.runs else ())
                yield count(one.family, one.token_ids, rows, named, span)


def count(
    family: str,
    ids_L: Tensor,
    drafted: Sequence[Tensor],
    named: Sequence[bool],
    span: tuple[int, int],
) -> Replay:
    """Count one answer, the tokens [start, end).

    Args:
        drafted: [S, L] of each of `VIEWS`; pass s at row p drafts token p + 2, -1: none.
        named: which of the answer's tokens name content.
    """
    import torch

    from vllm_vispec.train.acceptance import is_hit, replay

    start, end = span
    named_T = torch.tensor(named)[1:]  # the first token comes out of the prefill
    counts = []
    for drafted_SL in drafted:
        tokens_ST = drafted_SL[:, start - 1 : end - 2]
        both_2ST = torch.stack((tokens_ST == ids_L[start + 1 : end], tokens_ST >= 0))
        counts.append([(both_2ST & chosen_T).sum(2).T.tolist() for chosen_T in (named_T, ~named_T)])
    hits = is_hit(drafted[0][:, None], ids_L[None])[:, 0].tolist()
    return Replay(family, [replay(hits[:k], start, end) for k in DRAFT_TOKENS], counts)


def acceptance(seeds: Sequence[Sequence[Replay]]) -> dict[str, Any]:
    """Acceptance by kind of prompt and K; intervals are over seeds and answers."""
    found: dict[str, Any] = {}
    for kind in (*dict.fromkeys(one.family for one in seeds[0]), ALL):
        chosen = [[one for one in part if kind in (ALL, one.family)] for part in seeds]
        for place, k in enumerate(DRAFT_TOKENS):
            calls = [[Call((), (tuple(x.accepted[place]),)) for x in part] for part in chosen]
            rates = acceptance_rate_per_position([call for part in calls for call in part], k)
            found.setdefault(kind, {})[str(k)] = {
                "acceptance_length": estimate(calls, acceptance_length),
                "acceptance_rate_per_position": rates,
            }
    return found


def content(seeds: Sequence[Sequence[Replay]]) -> dict[str, Any]:
    """Share of right drafts by class, view and position of prompts with images, and what is lost.

    Means, and the ends of 95 % intervals over seeds and answers.
    """
    # Axes: seed, answer, view, class, position, (right, drafted).
    table = np.array([[one.counts for one in part if one.family != "text"] for part in seeds])

    def shares(drawn: Any) -> Any:
        right, drafted = np.moveaxis(drawn.sum((0, 1)), -1, 0)
        found = right / np.maximum(drafted, 1)
        return np.concatenate([found, found[:1] - found[1:]])

    low, high = bootstrap(table, (0, 1), shares)
    ends = {"mean": shares(table), "low": low, "high": high}
    return {
        name: {
            "tokens": int(table[0, :, 0, number, 0, 1].sum()),
            **{
                row: {end: values[place, number].tolist() for end, values in ends.items()}
                for place, row in enumerate((*VIEWS, *LOSSES))
            },
        }
        for number, name in enumerate(CLASSES)
    }
