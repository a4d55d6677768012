"""The samples of a run: which are trained on, which are held out, and in what order.

The order depends on seed and epoch alone. A resumed run, and a run on more processes with the
same samples per step, sees the same batches.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from vllm_vispec.data.encode import Encoded, Encoder, Measured, measured
from vllm_vispec.data.images import image_fingerprint, image_folder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.shards import exists, places
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, FINISH_KEY, Conversation, Rejected
from vllm_vispec.train.config import BatchConfig, DataConfig
from vllm_vispec.utils.errors import ViSpecError

HELD_OUT = "data.validation has the same dialogue"
# Reason of a rejection (pattern of its text) -> the name it is counted under.
SKIP_NAMES: Mapping[str, str] = {
    r"image .* (does not exist|is not a path)": "missing image",
    r"image .* cannot be read": "unreadable image",
    r"absolute aspect ratio": "image too narrow",
    r"longer than max_length: .* images": "images longer than data.max_length: lower max_pixels",
    r"longer than max_length": "longer than data.max_length",
    HELD_OUT: "in data.validation, too",
    r"": "unusable record",
}
EXAMPLES_PER_REASON = 3
GREEDY = "greedy answers"


@dataclass(frozen=True)
class Entry:
    """A conversation, and the folder that its image paths start from."""

    conversation: Conversation
    image_root: Path


@dataclass(frozen=True)
class Corpus:
    """All samples of a run.

    Attributes:
        entries: what could be read, files in the order given.
        train, validation: indices into `entries`.
        rejected: what could not be read.
        digest: SHA-256 over the data files and the samples chosen (images: by their paths only).
    """

    entries: tuple[Entry, ...]
    train: tuple[int, ...]
    validation: tuple[int, ...]
    rejected: tuple[Rejected, ...]
    digest: str


def read_corpus(settings: DataConfig, text_only: bool = False) -> Corpus:
    """Read all data files and hold samples out. The split does not depend on the run's seed.

    Args:
        text_only: train on samples without images only (held-out samples keep theirs).

    Raises:
        ViSpecError: a file cannot be read.
    """
    train, rejected = _read_files(settings.train, settings.image_root)
    if settings.max_samples:
        # Drawn, as files are in the order in which answers were finished: short ones first.
        train = [train[n] for n in _draw(range(len(train)), settings.max_samples)]
    held_out, rejected_too = _read_files(settings.validation, settings.image_root)
    # Files may overlap.
    apart = {(one.image_root, one.conversation.turns) for one in held_out}
    both = [one for one in train if (one.image_root, one.conversation.turns) in apart]
    train = [one for one in train if (one.image_root, one.conversation.turns) not in apart]
    rejected += [Rejected(one.conversation.sample_id, HELD_OUT) for one in both]
    numbers = list(range(len(train)))
    if settings.validation:
        held_out = [held_out[n] for n in _draw(range(len(held_out)), settings.validation_max)]
        validation = list(range(len(train), len(train) + len(held_out)))
    else:
        greedy = [n for n in numbers if _temperature(train[n]) == 0]
        # Those that `vispec regenerate` answered to be held out, among sampled ones.
        pool = greedy if len(greedy) < len(numbers) and greedy else numbers
        wanted = min(round(len(train) * settings.validation_share), settings.validation_max)
        validation = _draw(pool, wanted)
    entries = (*train, *held_out)
    taken = set(validation)
    chosen = [n for n in numbers if n not in taken]
    if text_only:
        chosen = [n for n in chosen if not entries[n].conversation.images]
    return Corpus(
        entries,
        tuple(chosen),
        tuple(validation),
        (*rejected, *rejected_too),
        _digest((*settings.train, *settings.validation), entries),
    )


def _temperature(entry: Entry) -> float | None:
    """At which the target answered; None if the record does not say."""
    found = entry.conversation.extra.get("temperature")
    return float(found) if isinstance(found, int | float) else None


def describe_answers(entries: Iterable[Entry]) -> str:
    """Return what a measurement on recorded answers means: greedy chains follow greedy ones."""
    found = [_temperature(entry) for entry in entries]
    known = sorted({one for one in found if one is not None})
    if None in found:
        return "answers of unknown temperature"
    if known == [0.0]:
        return GREEDY
    return f"answers at temperature {' and '.join(f'{one:g}' for one in known)}"


def _read_files(files: Sequence[str], image_root: str) -> tuple[list[Entry], list[Rejected]]:
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    for name in files:
        file, root = Path(name), Path(image_root) if image_root else None
        if not exists(file):
            raise ViSpecError(
                f"data.train or data.validation: {file} is no file: give one that "
                "`vispec regenerate` wrote"
            )
        for item in read_conversations(file, root):
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                entries.append(Entry(_compact(item), image_folder(file, root)))
    return entries, rejected


def _compact(conversation: Conversation) -> Conversation:
    """Hold recorded token ids as arrays: as lists they take nine times the memory, per process."""
    recorded = conversation.extra.get(ANSWER_TOKENS_KEY)
    if not recorded:
        return conversation
    try:
        arrays = [None if ids is None else array("i", ids) for ids in recorded]
    except (TypeError, OverflowError):
        return conversation  # no token ids: the encoder says so
    return replace(conversation, extra={**conversation.extra, ANSWER_TOKENS_KEY: arrays})


def _draw(numbers: Sequence[int], count: int) -> list[int]:
    if count >= len(numbers):
        return list(numbers)
    return sorted(Random("held out").sample(numbers, count))


def _digest(files: Iterable[str], entries: Iterable[Entry]) -> str:
    total = hashlib.sha256()
    # Shards were checked when they were read.
    for file in (file for name in files for file in places(Path(name))):
        with file.open("rb") as source:
            total.update(hashlib.file_digest(source, "sha256").digest())
    for entry in entries:
        total.update(entry.conversation.sample_id.encode() + b"\0")
    return total.hexdigest()


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, Any]:
    """Return skipped samples by reason: how many, and the first few as examples."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for item in rejected:
        name = next(name for pattern, name in SKIP_NAMES.items() if re.match(pattern, item.reason))
        counts[name] += 1
        if len(examples.setdefault(name, [])) < EXAMPLES_PER_REASON:
            examples[name].append(f"{item.sample_id}: {item.reason}")
    return {name: {"count": counts[name], "examples": examples[name]} for name in sorted(counts)}


class Samples:
    """Entries as the target sees them; whatever their length.

    Args:
        dtype: of image tensors that are floats.
    """

    def __init__(self, corpus: Corpus, processor: Any, dtype: torch.dtype) -> None:
        self._entries, self._dtype = corpus.entries, dtype
        roots = {entry.image_root for entry in corpus.entries}
        self._encoders = {root: Encoder(processor, image_root=root) for root in sorted(roots)}
        # Whether image sizes alone give an entry's tokens; None: not known yet.
        self._sizes_suffice: bool | None = None

    def key(self, index: int) -> str:
        """Return a digest of all that an entry is encoded from: turns, images, recorded tokens."""
        entry = self._entries[index]
        conversation = entry.conversation
        recorded = [conversation.extra.get(name) for name in (ANSWER_TOKENS_KEY, FINISH_KEY)]
        content: list[Any] = [recorded]
        for turn in conversation.turns:
            parts = [
                [image_fingerprint(part.image, entry.image_root)] if part.image else part.text
                for part in turn.parts
            ]
            content.append([turn.role, parts])
        return hashlib.sha256(json.dumps(content, default=list).encode()).hexdigest()[:32]

    def measure(self, index: int) -> Measured | Rejected:
        """Count one entry's tokens, or return why it is left out.

        Sizes of images suffice, once they gave for an entry what its pixels gave.
        """
        entry = self._entries[index]
        encoder, conversation = self._encoders[entry.image_root], entry.conversation
        if not conversation.images or self._sizes_suffice is False:
            return measured(encoder(conversation))
        found = encoder.measure(conversation)
        if self._sizes_suffice is None:
            by_sizes, found = found, measured(encoder(conversation))
            self._sizes_suffice = found == by_sizes
        return found

    def encode(self, index: int) -> Encoded | Rejected:
        """Encode one entry, or return why it is left out."""
        entry = self._entries[index]
        item = self._encoders[entry.image_root](entry.conversation)
        if isinstance(item, Rejected):
            return item
        vision = {
            name: value.to(self._dtype) if value.is_floating_point() else value
            for name, value in item.vision.items()
        }
        return replace(item, vision=vision)


def require(items: Iterable[Encoded | Rejected]) -> list[Encoded]:
    """Return entries that were usable when the run began.

    Raises:
        ViSpecError: one no longer is, e.g. an image was removed.
    """
    found = []
    for item in items:
        if isinstance(item, Rejected):
            raise ViSpecError(
                f"sample {item.sample_id!r} was usable when the run began and is not any more "
                f"({item.reason}): put its image back"
            )
        found.append(item)
    return found


@dataclass(frozen=True)
class BatchOrder:
    """Which samples each step takes, in batches: what one process sees in one forward pass.

    Samples are shuffled, pools of them are sorted by length so that a batch holds samples of like
    length, and the batches are shuffled. A step takes the next of them, whatever number of
    processes shares them. An epoch is filled up to whole steps with samples from its own beginning.

    Attributes:
        indices: samples to train on.
        lengths: tokens of each, by index.
        settings: size of a batch, batches per process and step, batches in a pool.
        world: number of processes.
        seed: of the order.
    """

    indices: tuple[int, ...]
    lengths: Mapping[int, int]
    settings: BatchConfig
    world: int
    seed: int

    @property
    def step_samples(self) -> int:
        """Samples per optimizer step over all processes."""
        return self.settings.size * self.settings.accumulate * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the data."""
        return -(-len(self.indices) // self.step_samples)

    def epoch(self, number: int) -> list[list[list[int]]]:
        """Return the steps of an epoch: lists of batches, the longest ones last.

        With `max_tokens`, steps have different numbers of batches.
        """
        random = Random(f"order {self.seed} {number}")
        order = random.sample(self.indices, len(self.indices))
        wanted = self.steps_per_epoch * self.step_samples
        order = (order * -(-wanted // len(order)))[:wanted]
        size, pool = self.settings.size, max(self.settings.pool, 1) * self.settings.size
        batches: list[list[int]] = []
        for first in range(0, wanted, pool):
            drawn = sorted(order[first : first + pool], key=lambda n: (self.lengths[n], n))
            batches += [drawn[i : i + size] for i in range(0, len(drawn), size)]
        random.shuffle(batches)
        per_step = self.settings.accumulate * self.world
        steps = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        if self.settings.max_tokens:
            steps = [self._filled(step) for step in steps]
        # What processes do at the same time is of like length.
        return [sorted(step, key=lambda batch: self.lengths[batch[-1]]) for step in steps]

    def _filled(self, step: Sequence[list[int]]) -> list[list[int]]:
        """Put a step's samples into batches of at most `max_tokens`, as many for each process.

        A longer sample is alone in its batch.
        """
        found: list[list[int]] = []
        samples = sorted((n for batch in step for n in batch), key=lambda n: (self.lengths[n], n))
        for sample in samples:
            # The longest one so far: others are padded to it.
            fits = (len(found[-1]) + 1) * self.lengths[sample] if found else 0
            if 0 < fits <= self.settings.max_tokens:
                found[-1].append(sample)
            else:
                found.append([sample])
        while len(found) % self.world:
            fullest = max(found, key=len)
            half = len(fullest) // 2
            found.append(fullest[half:])
            del fullest[half:]
        return found

    def mine(self, step: Sequence[list[int]], rank: int) -> list[list[int]]:
        """Return one process's batches of a step."""
        return list(step[rank :: self.world])
