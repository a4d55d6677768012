"""Datasets to benchmark with. A new one is one `Adapter` in `ADAPTERS`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import Field

from vllm_vispec.bench.public_sets import UNLABELLED, read_mmspec, read_vispec
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.images import BadImage, image_file, image_folder, open_image
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.shards import exists
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing
from vllm_vispec.utils.settings import CommandSettings, CommaSeparated

CATEGORIES = ("general_vqa", "text_vqa", "captioning", "charts", "reasoning", "multi_turn")
"""The six task categories that MMSpec and the tiny world of the examples share."""
REASONS_SHOWN = 5
TINY_FILE = "questions.jsonl"
TINY_COMMAND = "python -m examples.tiny_vlm.questions --split heldout --start 100000 --count 60"


class DatasetOptions(CommandSettings):
    """Which part of a dataset is asked, and how.

    A sample's place depends on the seed and its own id alone. So a smaller limit gives the
    beginning of what a larger one gives, and adding records to a file moves none of the others.
    """

    families: Annotated[tuple[str, ...], CommaSeparated] = Field(
        default=(), description="Only these task families, separated by commas; default: all."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Most samples, from the families in turns; default: all."
    )
    seed: int = Field(default=0, description="Which samples --limit keeps.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest answer; default: the dataset's."
    )
    image_root: Path | None = Field(
        default=None, description="Where image paths start; default: the dataset's convention."
    )


@dataclass(frozen=True)
class Adapter:
    """A way to read a dataset.

    Attributes:
        read: yields the records in their order, image paths absolute. It leaves `families` to its
            caller, apart from not asking for files that no wanted family needs.
        max_tokens: longest answer if the options name none.
        every_question: each question of a dialogue is a sample of its own, and recorded answers
            between questions are left out, so that the target's own stand there; else the last
            question is asked, behind the recorded answers.
    """

    read: Callable[[Path, DatasetOptions], Iterator[Conversation | Rejected]]
    max_tokens: int
    every_question: bool = False


@dataclass(frozen=True)
class LoadedDataset:
    """The samples to ask, and what became of the rest.

    Attributes:
        samples: families in turns, so that every part of a run sees the same mixture.
        rejected: records and samples that cannot be used, with reasons.
        not_chosen: usable samples that `families` or `limit` left out.
    """

    name: str
    samples: tuple[BenchSample, ...]
    rejected: tuple[Rejected, ...]
    not_chosen: int

    def notes(self) -> list[str]:
        """Lines for the user: what is asked, and what was left out and why."""
        families = Counter(sample.family for sample in self.samples)
        counts = ", ".join(f"{name} {count}" for name, count in families.items())
        lines = [f"dataset {self.name}: {len(self.samples)} samples ({counts})"]
        if self.not_chosen:
            lines.append(f"  {self.not_chosen} more were not chosen")
        if self.rejected:
            lines.append(f"  {len(self.rejected)} cannot be used:")
        reasons = Counter(item.reason for item in self.rejected).most_common(REASONS_SHOWN)
        return lines + [f"    {count} x {reason}" for reason, count in reasons]


def _read_openai(path: Path, options: DatasetOptions) -> Iterator[Conversation | Rejected]:
    """Yield the dialogues of a conversation file, OpenAI or LLaVA style."""
    if not exists(path):
        raise ViSpecError(
            f"dataset openai: {path} is no file; give JSON lines with messages (OpenAI) or "
            "conversations (LLaVA), images as paths"
        )
    folder = image_folder(path, options.image_root)

    def absolute(item: Conversation | Rejected) -> Conversation | Rejected:
        if isinstance(item, Rejected):
            return item
        turns = _map_images(item.turns, lambda image: str(image_file(image, folder).resolve()))
        return replace(item, turns=turns)

    return map(absolute, read_conversations(path, options.image_root))


def _read_tiny(path: Path, options: DatasetOptions) -> Iterator[Conversation | Rejected]:
    """Yield the questions of the tiny world: the folder that was written, or its file."""
    file = path if path.is_file() or path.suffix == ".jsonl" else path / TINY_FILE
    if not file.is_file():
        raise ViSpecError(
            f"dataset tiny: {file} does not exist; write it with {TINY_COMMAND} --output "
            f"{file.parent}"
        )
    return _read_openai(file, options)


ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        "mmspec": Adapter(lambda path, o: read_mmspec(path, o.image_root), 1024, True),
        "vispec": Adapter(lambda path, o: read_vispec(path, o.families, o.image_root), 1024),
        "openai": Adapter(_read_openai, 256),
        # The file's own answers are as terse as those of public question sets.
        "tiny": Adapter(_read_tiny, 256, True),
    }
)


def load_dataset(name: str, path: Path, options: DatasetOptions | None = None) -> LoadedDataset:
    """Read a dataset and choose the samples to ask.

    Args:
        name: of an adapter in `ADAPTERS`.
        path: file or folder, as the adapter says.

    Raises:
        ViSpecError: there is no such adapter, its files are missing, a wanted family does not
            occur, or no sample can be used; the message gives the first reason.
    """
    options = options or DatasetOptions()
    adapter = ADAPTERS.get(name)
    if adapter is None:
        raise ViSpecError(f"dataset {name} is unknown; there are {', '.join(ADAPTERS)}")
    samples: list[BenchSample] = []
    rejected: list[Rejected] = []
    for item in adapter.read(path, options):
        try:
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                samples += _samples_of(item, adapter, options.max_tokens or adapter.max_tokens)
        except ValueError as error:
            rejected.append(Rejected(item.sample_id, str(error)))
    chosen, unreadable = _choose(samples, options) if samples else ([], [])
    rejected += unreadable
    if not chosen:
        reason = f"first: {rejected[0].reason}" if rejected else "empty"
        raise ViSpecError(
            f"dataset {name}: {path} gives no sample, {len(rejected)} records are unusable "
            f"({reason}); check the file"
        )
    not_chosen = len(samples) - len(chosen) - len(unreadable)
    return LoadedDataset(name, tuple(chosen), tuple(rejected), not_chosen)


def _samples_of(dialogue: Conversation, adapter: Adapter, max_tokens: int) -> list[BenchSample]:
    """Return one sample per question, or for the last question.

    A dialogue of several questions gives ids with the question's number: ``501#2``.

    Raises:
        ValueError: a chat server would refuse the dialogue, or it leaves nothing to answer.
    """
    turns = dialogue.turns
    places = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not places:
        raise ValueError("no question")
    if turns[0].role == "assistant":
        raise ValueError("it begins with an answer")
    for turn in turns:
        has_image = any(part.image for part in turn.parts)
        if turn.role == "user" and not turn.text.strip() and not has_image:
            raise ValueError("an empty question")
        if turn.role != "user" and has_image:
            raise ValueError("an image outside a question")
    family, samples = dialogue.family or UNLABELLED, []
    for number, place in enumerate(places, start=1):
        asked = turns[: place + 1]
        if adapter.every_question:
            asked = tuple(turn for turn in asked if turn.role != "assistant")
        name = dialogue.sample_id if len(places) == 1 else f"{dialogue.sample_id}#{number}"
        samples.append(BenchSample(name, family, asked, max_tokens))
    return samples if adapter.every_question else samples[-1:]


def _choose(
    samples: Sequence[BenchSample], options: DatasetOptions
) -> tuple[list[BenchSample], list[Rejected]]:
    """Return the samples to ask, families in turns, and those whose images cannot be read.

    Only images of samples that are about to be chosen are opened, each file once.

    Raises:
        ViSpecError: a wanted family does not occur.
    """
    there = dict.fromkeys(sample.family for sample in samples)
    missing = [name for name in options.families if name not in there]
    if missing:
        raise ViSpecError(
            f"family {', '.join(missing)} has no usable sample in the dataset; there are "
            f"{', '.join(there)}"
        )

    chosen: list[BenchSample] = []
    rejected: list[Rejected] = []
    opened = cache(lambda image: open_image(image, None).size)
    wanted = [one for one in samples if not options.families or one.family in options.families]
    for sample in _in_turns(wanted, options.seed):
        if len(chosen) == options.limit:
            break
        try:
            for image in sample.images:
                opened(image)
            chosen.append(sample)
        except BadImage as error:
            rejected.append(Rejected(sample.sample_id, str(error)))
    return chosen, rejected


def _in_turns(samples: Iterable[BenchSample], seed: int) -> Iterator[BenchSample]:
    """Yield one sample of each family, then the next of each, until all are through."""
    groups: dict[str, list[BenchSample]] = {}
    for sample in sorted(samples, key=lambda x: sha256(f"{seed}:{x.sample_id}".encode()).digest()):
        groups.setdefault(sample.family, []).append(sample)
    places = ((place, name) for name, group in groups.items() for place in range(len(group)))
    return (groups[name][place] for place, name in sorted(places))


def with_square_images(sample: BenchSample, side: int, folder: Path) -> BenchSample:
    """Return the sample with copies of its images that have `side` x `side` pixels.

    The aspect ratio is not kept: requests of one cell are to have equally many image tokens. The
    copies are PNG files in `folder`, named after the content and the size, and made once.

    Raises:
        ViSpecError: an image cannot be read, or a copy cannot be written.
    """
    from PIL.Image import Resampling

    def resize(path: str) -> str:
        try:
            image = open_image(path, None)
        except BadImage as error:
            raise ViSpecError(f"{error}; remove its record from the dataset") from error
        digest = sha256(Path(path).read_bytes()).hexdigest()[:24]
        target = (folder / f"{digest}-{side}x{side}.png").resolve()
        if not target.is_file():
            with writing(target) as aside:
                image.resize((side, side), Resampling.BICUBIC).save(aside, format="PNG")
        return str(target)

    return replace(sample, turns=_map_images(sample.turns, resize))


def without_images(sample: BenchSample) -> BenchSample:
    """Return the sample with text alone; a turn that was only images says so in words."""
    said = (Part(text="(no image)"),)
    turns = tuple(
        replace(turn, parts=tuple(part for part in turn.parts if not part.image) or said)
        for turn in sample.turns
    )
    return replace(sample, turns=turns)


def _map_images(turns: Iterable[Turn], change: Callable[[str], str]) -> tuple[Turn, ...]:
    def changed(part: Part) -> Part:
        return replace(part, image=change(part.image)) if part.image else part

    return tuple(replace(turn, parts=tuple(map(changed, turn.parts))) for turn in turns)
