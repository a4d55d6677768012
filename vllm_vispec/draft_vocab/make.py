"""`vispec vocab`: from answers to the list of tokens that a head's folder ships."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vispec import __version__
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import Rejected
from vllm_vispec.draft_vocab.count import (
    TokenCounts,
    answer_ids,
    count_tokens,
    coverage_by_size,
    rank_tokens,
)
from vllm_vispec.draft_vocab.files import (
    DRAFT_VOCAB,
    DRAFT_VOCAB_FACTS,
    MIN_TOKENS,
    write_vocab,
)
from vllm_vispec.heads import inspect_head
from vllm_vispec.utils.errors import ViSpecError

DEFAULT_SIZE = 32768


@dataclass(frozen=True)
class VocabOptions:
    """What to count, and what to write.

    Attributes:
        target: folder or hub id, for its tokenizer.
        head: folder or hub id, for the size of the vocabulary.
        data: JSON lines of conversations with the target's answers.
        output: folder to write to; None: the head's.
        size: tokens of the list, or None for `DEFAULT_SIZE`; never more than the target has.
        overwrite: replace an earlier list.

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
        facts: what lies beside it as JSON: counts, coverage by number of tokens, provenance.
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
    ids = rank_tokens(counts.total, special, vocab_size)[:size]
    facts = _facts(options, counts, special, vocab_size, size) | {"skipped": len(rejected)}
    write_vocab(folder / DRAFT_VOCAB, ids)
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
    """Special tokens of the tokenizer, and what ends a generation."""
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


def _facts(
    options: VocabOptions, counts: TokenCounts, special: Sequence[int], vocab_size: int, size: int
) -> dict[str, Any]:
    return {
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
    }
