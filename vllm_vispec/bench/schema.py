"""What a benchmark run writes down: raw records only, every number is computed from them later.

A run is a folder with `run.json` (format, machine, settings) and `cells.jsonl` (one `CellResult` a
line; `cells.jsonl.gz` has the ones before them). `BenchRun.load` takes such a folder or one JSON
file written by `BenchRun.to_json`. Times are in seconds, to the microsecond.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from vllm_vispec.data.types import Turn
from vllm_vispec.utils.errors import ViSpecError

FORMAT = 1
RUN_FILE = "run.json"
CELLS_FILE = "cells.jsonl"
PACKED_FILE = "cells.jsonl.gz"
"""The same, for a run that is kept; a later call writes what it adds to `CELLS_FILE`."""
IMAGES_AS_THEY_ARE = -1
"""`CellKey.image_tokens` of a cell whose images were not resized; 0 means that none was sent."""

Json = Mapping[str, Any]


class Record:
    """A frozen dataclass that becomes JSON and comes back from it."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        content: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return content

    @classmethod
    def from_json(cls, content: Json) -> Self:
        """Read what `to_json` returned.

        Raises:
            ViSpecError: a field is missing or of another type.
        """
        try:
            record: Self = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"])
            raise ViSpecError(
                f"{cls.__name__}: {place}: {first['msg']}; the benchmark's data is damaged, run "
                "it again"
            ) from error
        return record


@dataclass(frozen=True)
class BenchSample(Record):
    """A question to ask; the answer to the last turn is measured.

    Attributes:
        sample_id: unique in its dataset.
        family: the task category.
        turns: begins with the user or a system turn and ends with the user. Images are absolute
            paths. An answer that stands between two questions is sent as it is. Where two
            questions follow each other (see `follow_up`), the target's own greedy answer is put
            between them once per run, the same for all variants.
        max_tokens: longest answer.
    """

    sample_id: str
    family: str
    turns: tuple[Turn, ...]
    max_tokens: int

    @property
    def follow_up(self) -> bool:
        """Whether an earlier question still lacks its answer."""
        roles = [turn.role for turn in self.turns]
        return any(a == b == "user" for a, b in pairwise(roles))

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of all images in the order of their appearance."""
        return tuple(part.image for turn in self.turns for part in turn.parts if part.image)


@dataclass(frozen=True)
class CellKey(Record):
    """One cell of the matrix.

    Attributes:
        variant: a name in `vllm_vispec.bench.matrix.VARIANTS`; runs of earlier versions call it
            side.
        concurrency: requests in flight, at most.
        num_speculative_tokens: K of the servers that were up together. The baseline, which drafts
            nothing, is measured again beside every K and has that K here.
        temperature: 0 is greedy.
        image_tokens: tokens of each request's images together, `IMAGES_AS_THEY_ARE`, or 0.
        dataset: its name.
    """

    variant: Annotated[str, Field(validation_alias=AliasChoices("variant", "side"))]
    concurrency: int
    num_speculative_tokens: int
    temperature: float
    image_tokens: int
    dataset: str


@dataclass(frozen=True)
class Request(Record):
    """One answered request.

    `vllm bench serve` keeps the text of an answer and the number of its tokens, not their ids.
    Outputs are therefore compared by text (special tokens included) and number: `same_output`.

    Attributes:
        output_text: with special tokens written out; "" if it failed.
        output_tokens: as the server counted them.
        prompt_tokens: as the server counted them, image tokens included.
        ttft_s: request to first chunk.
        e2e_s: request to last chunk.
        itl_s: between the chunks of the stream. A chunk holds the tokens of one step, so with
            speculation there are fewer gaps than tokens: decode seconds per token are
            `(e2e_s - ttft_s) / (output_tokens - 1)`, not the mean of these.
        error: why it failed; None if it did not.
    """

    sample_id: str
    family: str
    output_text: str
    output_tokens: int
    prompt_tokens: int
    ttft_s: float
    e2e_s: float
    itl_s: tuple[float, ...]
    error: str | None = None

    @property
    def decode_s(self) -> float:
        """Seconds from the first chunk to the last."""
        return self.e2e_s - self.ttft_s

    def same_output(self, other: Request) -> bool:
        """Whether both succeeded with the same answer."""
        return (
            self.error is None
            and other.error is None
            and self.output_text == other.output_text
            and self.output_tokens == other.output_tokens
        )


@dataclass(frozen=True)
class SpecCounters(Record):
    """vLLM's `vllm:spec_decode_*` counters, what was added during the cell.

    Attributes:
        steps: in which something was drafted; runs of earlier versions call them rounds.
        draft_tokens: tokens drafted.
        accepted_tokens: draft tokens accepted, bonus tokens not counted.
        accepted_by_position: accepted tokens at each of the K positions.
    """

    steps: Annotated[int, Field(validation_alias=AliasChoices("steps", "rounds"))]
    draft_tokens: int
    accepted_tokens: int
    accepted_by_position: tuple[int, ...]


@dataclass(frozen=True)
class MemoryFacts(Record):
    """Memory of the variant's server at the end of the cell; None where nothing says it.

    Attributes:
        peak_bytes: most bytes the server's processes held since it was started: device memory if
            there is a GPU, else resident memory.
        kv_blocks: KV-cache blocks the server has.
        image_table_hits: lookups, one per request and step, that found an image's adaptor output,
            during the cell.
        image_table_misses: lookups that had to compute it, or could not, during the cell.
    """

    peak_bytes: int | None = None
    kv_blocks: int | None = None
    image_table_hits: int | None = None
    image_table_misses: int | None = None

    def since(self, before: MemoryFacts) -> MemoryFacts:
        """Return this reading with the image lookups counted from an earlier one on."""
        names = ("image_table_hits", "image_table_misses")
        pairs = ((name, getattr(self, name), getattr(before, name)) for name in names)
        return replace(self, **{name: None if None in (a, b) else a - b for name, a, b in pairs})


@dataclass(frozen=True)
class CellResult(Record):
    """One repetition of one cell.

    Attributes:
        repetition: from 0 on.
        requests: in the order of the dataset; empty if the cell failed as a whole.
        wall_s: first request sent to last answer read.
        spec: None for the baseline, and if the cell failed.
        command: what starts the variant's server, and what made the load, one a line.
        error: why the cell failed as a whole; None if it did not. Single requests may have failed
            even so.
    """

    key: CellKey
    repetition: int
    requests: tuple[Request, ...]
    wall_s: float
    spec: SpecCounters | None
    memory: MemoryFacts
    command: str
    error: str | None = None


@dataclass(frozen=True)
class BenchRun(Record):
    """A whole run.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        machine: processor, device, versions of packages.
        settings: what was asked for, see `vllm_vispec.bench.matrix.MatrixSettings.to_json`.
        cells: in the order in which they were measured, each once.
    """

    format: int
    machine: Json
    settings: Json
    cells: tuple[CellResult, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a run folder, or one JSON file; of cells measured again, the last attempt counts.

        Raises:
            ViSpecError: it cannot be read, is damaged, or was written by another version.
        """
        try:
            file = path / RUN_FILE if path.is_dir() else path
            content = json.loads(file.read_text(encoding="utf-8"))
            if path.is_dir():
                content["cells"] = read_cells(path)
        except (OSError, EOFError, zlib.error, json.JSONDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ViSpecError(
                f"benchmark run {path} cannot be read ({reason}): give the folder that "
                "`vispec bench run` wrote"
            ) from error
        if content.get("format") != FORMAT:
            raise ViSpecError(
                f"the benchmark run has format {content.get('format')!r}, this version reads "
                f"{FORMAT}: run `vispec bench run` again"
            )
        # Earlier versions called variants sides.
        settings = {("variants" if n == "sides" else n): v for n, v in content["settings"].items()}
        run = cls.from_json({**content, "settings": settings})
        last = {(cell.key, cell.repetition): cell for cell in run.cells}
        cells = tuple(cell for cell in run.cells if last[cell.key, cell.repetition] is cell)
        return replace(run, cells=cells)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Return the cells of a run's folder as plain data; a last line that was cut off is left out.

    Raises:
        OSError, EOFError, zlib.error, json.JSONDecodeError: they cannot be read, or another line is
            damaged.
    """
    file, packed = folder / CELLS_FILE, folder / PACKED_FILE
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else b""
    if file.exists():
        # A run that was kept and then continued.
        content += file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]
