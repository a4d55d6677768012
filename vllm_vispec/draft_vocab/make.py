"""`vispec vocab`: from answers to the list of tokens that a head's folder ships.

The list has the most frequent tokens first; beside it lies how much of the answers it covers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vllm_vispec import __version__
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, Conversation, Rejected
from vllm_vispec.draft_vocab.files import MIN_TOKENS, write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB, DRAFT_VOCAB_FACTS, inspect_head
from vllm_vispec.utils.errors import ViSpecError

HELD_OUT_EVERY = 10
"""Every tenth answer is held out: its coverage is by a ranking of the others' tokens."""
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Sizes of lists whose coverage is stated, as far as the target has as many tokens."""
DEFAULT_SIZE = 32768


@dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in answers.

    Attributes:
        ranked: counts of nine answers in ten.
        held_out: counts of the tenth.
        answers: number of answers.
    """

    ranked: Counter[int]
    held_out: Counter[int]
    answers: int

    @property
    def total(self) -> Counter[int]:
        """Counts of all answers."""
        return self.ranked + self.held_out


def answer_ids(
    conversation: Conversation, tokenize: Callable[[str], Sequence[int]]
) -> Iterator[Sequence[int]]:
    """Yield the token ids of every assistant turn: the recorded ones, else those of its text."""
    recorded = conversation.extra.get(ANSWER_TOKENS_KEY) or ()
    turns = [turn for turn in conversation.turns if turn.role == "assistant"]
    for index, turn in enumerate(turns):
        ids = recorded[index] if index < len(recorded) else None
        yield tokenize(turn.text) if ids is None else ids


def count_tokens(answers: Iterable[Sequence[int]]) -> TokenCounts:
    """Count the tokens of all answers."""
    ranked: Counter[int] = Counter()
    held_out: Counter[int] = Counter()
    number = 0
    for number, ids in enumerate(answers, start=1):
        (ranked if number % HELD_OUT_EVERY else held_out).update(ids)
    return TokenCounts(ranked, held_out, number)


def rank_tokens(counts: Counter[int], special: Iterable[int], vocab_size: int) -> list[int]:
    """Rank all tokens of the target: special ones, then by frequency, then the unseen by their id.

    Ids of a BPE vocabulary follow the order of the merges, so of the unseen tokens the likeliest
    come first.
    """
    seen = sorted(counts, key=lambda token: (-counts[token], token))
    ordered = dict.fromkeys(chain(sorted(special), seen, range(vocab_size)))
    return [token for token in ordered if 0 <= token < vocab_size]


def coverage(counts: Counter[int], token_ids: Iterable[int]) -> float | None:
    """Return the share of the counted tokens that a list has; None if nothing was counted."""
    total = sum(counts.values())
    return sum(counts[token] for token in set(token_ids)) / total if total else None


def coverage_by_size(
    counts: TokenCounts, special: Sequence[int], vocab_size: int, size: int
) -> dict[str, dict[str, float | None]]:
    """Return the coverage of the N most frequent tokens, for N in `SIZES` and `size`.

    "all" is the coverage of all answers. "held_out" ranks tokens by the other answers, so it says
    more about new questions.
    """
    ranking = rank_tokens(counts.total, special, vocab_size)
    others = rank_tokens(counts.ranked, special, vocab_size)
    return {
        str(n): {
            "all": coverage(counts.total, ranking[:n]),
            "held_out": coverage(counts.held_out, others[:n]),
        }
        for n in sorted({*SIZES, size})
        if n <= vocab_size
    }


@dataclass(frozen=True)
class VocabOptions:
    """What to count, and what to write.

    Attributes:
        target: Folder or hub id of the target, for its tokenizer.
        head: Folder or hub id of the head, for the size of the vocabulary.
        data: Answers of the target, e.g. the output of `vispec regenerate`.
        output: Folder to write to; default: the head's.
        size: Tokens of the list; default: 32768, or all.
        overwrite: Replace an earlier list.

    Raises:
        ViSpecError: the size is too small.
    """

    target: str
    head: str
    data: Path
    output: Path | None = None
    size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < MIN_TOKENS:
            raise ViSpecError(f"--size {self.size} is too small: use at least {MIN_TOKENS}")


@dataclass(frozen=True)
class MadeVocab:
    """A list that was written.

    Attributes:
        file: where.
        facts: content of the JSON beside it: counts, coverage by number of tokens, provenance.
    """

    file: Path
    facts: dict[str, Any]


def make_vocab(options: VocabOptions) -> MadeVocab:
    """Count the answers' tokens, rank them and write the list with its facts.

    Raises:
        ViSpecError: head, tokenizer or data cannot be used, or the list exists.
    """
    info = inspect_head(options.head)
    folder = _folder(options)
    vocab_size = info.config.vocab_size
    size = min(options.size or DEFAULT_SIZE, vocab_size)
    tokenizer = _load_tokenizer(options.target)
    special = [token for token in _special_ids(tokenizer, options.target) if token < vocab_size]
    if size < len(special):
        raise ViSpecError(
            f"--size {size} has no room for the target's {len(special)} special tokens: use more"
        )
    rejected: list[Rejected] = []
    counts = count_tokens(_answers(options.data, tokenizer, rejected))
    _check_counts(counts, vocab_size, options, rejected)
    facts = {
        "format": 1,
        "tokens": size,
        "target_tokens": vocab_size,
        "special_tokens": len(special),
        "answers": counts.answers,
        "answer_tokens": sum(counts.total.values()),
        "distinct_answer_tokens": len(counts.total),
        "coverage": coverage_by_size(counts, special, vocab_size, size),
        "target": options.target,
        "data": options.data.name,
        "version": __version__,
        "skipped": len(rejected),
    }
    write_vocab(folder / DRAFT_VOCAB, rank_tokens(counts.total, special, vocab_size)[:size])
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (folder / DRAFT_VOCAB_FACTS).write_text(text + "\n", encoding="utf-8")
    return MadeVocab(folder / DRAFT_VOCAB, facts)


def _folder(options: VocabOptions) -> Path:
    folder = options.output or Path(options.head).expanduser()
    if not folder.is_dir():
        raise ViSpecError(
            f"--output {folder} is no folder: give an existing one (a head from the hub has "
            "none of its own)"
        )
    if (folder / DRAFT_VOCAB).exists() and not options.overwrite:
        raise ViSpecError(f"{folder / DRAFT_VOCAB} exists: add --overwrite, or give --output")
    return folder


def _load_tokenizer(target: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    # The hub's client and the tokenizers raise errors of several families.
    except Exception as error:
        raise ViSpecError(
            f"--target {target} has no tokenizer that can be read ({type(error).__name__}): give "
            "the target's folder or hub id"
        ) from error


def _special_ids(tokenizer: Any, target: str) -> list[int]:
    """Return the special tokens of the tokenizer and those that end a generation."""
    from transformers import GenerationConfig

    ids = set(tokenizer.all_special_ids)
    try:
        ends = GenerationConfig.from_pretrained(target).eos_token_id
    except OSError:
        ends = None
    ids.update(ends if isinstance(ends, list) else [ends])
    return sorted(one for one in ids if one is not None)


def _answers(data: Path, tokenizer: Any, rejected: list[Rejected]) -> Iterator[Sequence[int]]:
    def tokenize(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    for item in read_conversations(data, check_images=False):
        if isinstance(item, Rejected):
            rejected.append(item)
        else:
            yield from answer_ids(item, tokenize)


def _check_counts(
    counts: TokenCounts, vocab_size: int, options: VocabOptions, rejected: Sequence[Rejected]
) -> None:
    if not counts.total:
        reason = f" (first reason: {rejected[0].reason})" if rejected else ""
        raise ViSpecError(
            f"--data {options.data} has no answer to count{reason}: give the output of "
            "`vispec regenerate`"
        )
    largest = max(counts.total)
    if largest >= vocab_size:
        raise ViSpecError(
            f"--data {options.data} has token id {largest}, the head's target has 0 to "
            f"{vocab_size - 1}: give answers of that target"
        )
