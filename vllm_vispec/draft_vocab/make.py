"""`vispec vocab`: from answers to the list of tokens that a head's folder ships.

The list has the most frequent tokens first; beside it lies how much of the answers it covers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from vllm_vispec import __version__
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, Conversation, Rejected
from vllm_vispec.draft_vocab.files import MIN_TOKENS, write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB, DRAFT_VOCAB_FACTS, inspect_head
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json
from vllm_vispec.utils.settings import Settings

HELD_OUT_EVERY = 10
"""Every tenth answer is held out: its coverage is by a ranking of the others' tokens."""
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Sizes of lists whose coverage is stated, as far as the target has as many tokens."""
DEFAULT_SIZE = 32768


class VocabOptions(Settings):
    """What to count, and what to write."""

    target: str = Field(description="Folder or hub id of the target, for its tokenizer.")
    head: str = Field(description="Folder or hub id of the head, for the size of the vocabulary.")
    data: Path = Field(description="Answers of the target, e.g. the output of `vispec regenerate`.")
    output: Path | None = Field(None, description="Folder to write to; default: the head's.")
    size: int | None = Field(
        None, ge=MIN_TOKENS, description="Tokens of the list; default: 32768, or all."
    )
    overwrite: bool = Field(False, description="Replace an earlier list.")


class TokenCounts(NamedTuple):
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


class MadeVocab(NamedTuple):
    """A list that was written, and the content of the JSON beside it."""

    file: Path
    facts: dict[str, Any]


def make_vocab(options: VocabOptions) -> MadeVocab:
    """Count the answers' tokens, rank them and write the list with its facts.

    Raises:
        ViSpecError: head, tokenizer or data cannot be used, or the list exists.
    """
    info = inspect_head(options.head)
    file = _file(options)
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
    total = counts.total
    if not total:
        reason = f" (first reason: {rejected[0].reason})" if rejected else ""
        raise ViSpecError(
            f"--data {options.data} has no answer to count{reason}: give the output of "
            "`vispec regenerate`"
        )
    if max(total) >= vocab_size:
        raise ViSpecError(
            f"--data {options.data} has token id {max(total)}, the head's target has 0 to "
            f"{vocab_size - 1}: give answers of that target"
        )
    facts = {
        "format": 1,
        "tokens": size,
        "target_tokens": vocab_size,
        "special_tokens": len(special),
        "answers": counts.answers,
        "answer_tokens": sum(total.values()),
        "distinct_answer_tokens": len(total),
        "coverage": coverage_by_size(counts, special, vocab_size, size),
        "target": options.target,
        "data": options.data.name,
        "version": __version__,
        "skipped": len(rejected),
    }
    write_vocab(file, rank_tokens(total, special, vocab_size)[:size])
    write_json(file.with_name(DRAFT_VOCAB_FACTS), facts)
    return MadeVocab(file, facts)


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


def coverage_by_size(
    counts: TokenCounts, special: Sequence[int], vocab_size: int, size: int
) -> dict[str, dict[str, float | None]]:
    """Return the coverage of the N most frequent tokens, for N in `SIZES` and `size`.

    "all" is the coverage of all answers. "held_out" ranks tokens by the other answers, so it says
    more about new questions; None without held-out answers.
    """
    total = counts.total
    ranking = rank_tokens(total, special, vocab_size)
    others = rank_tokens(counts.ranked, special, vocab_size)
    return {
        str(n): {
            "all": _coverage(total, ranking[:n]),
            "held_out": _coverage(counts.held_out, others[:n]),
        }
        for n in sorted({*SIZES, size})
        if n <= vocab_size
    }


def _coverage(counts: Counter[int], token_ids: Iterable[int]) -> float | None:
    """Return the share of the counted tokens that a list has; None if nothing was counted."""
    total = sum(counts.values())
    return sum(counts[token] for token in token_ids) / total if total else None


def _file(options: VocabOptions) -> Path:
    folder = options.output or Path(options.head).expanduser()
    if not folder.is_dir():
        raise ViSpecError(
            f"--output {folder} is no folder: give an existing one (a head from the hub has "
            "none of its own)"
        )
    file = folder / DRAFT_VOCAB
    if file.exists() and not options.overwrite:
        raise ViSpecError(f"{file} exists: add --overwrite, or give --output")
    return file


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
