"""Work over all samples, cut into chunks that are done once, by any process, and kept on disk.

The folder holds index.json (what the results belong to) and one JSON file per finished chunk, a
list with one record per sample. A killed job goes on with the chunks that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_vispec.train.distributed import Processes
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json

Record = dict[str, Any]
Work = Callable[[int, range], list[Record]]


def finish_chunks(
    folder: Path, key: Mapping[str, Any], count: int, size: int, group: Processes, work: Work
) -> list[Record]:
    """Do what is missing and return the records of all `count` samples in order.

    Args:
        folder: where results are kept.
        key: plain data that says what they belong to.
        size: samples per chunk.
        work: called with a chunk's number and its samples.

    Raises:
        ViSpecError: the folder holds the results of something else, or cannot be written.
    """
    chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
    if group.is_main:
        _claim(folder, {**key, "samples": count, "chunk_samples": size})
    group.wait()
    for number, samples in enumerate(chunks):
        if number % group.world == group.rank and not chunk_file(folder, number).is_file():
            write_json(chunk_file(folder, number), work(number, samples))
    group.wait()
    records: list[Record] = []
    for number in range(len(chunks)):
        records += json.loads(chunk_file(folder, number).read_text(encoding="utf-8"))
    return records


def chunk_file(folder: Path, number: int) -> Path:
    """Where the records of a chunk are kept."""
    return folder / f"chunk-{number:05d}.json"


def _claim(folder: Path, key: Mapping[str, Any]) -> None:
    index = folder / "index.json"
    if not index.is_file():
        write_json(index, dict(key))
        return
    found = json.loads(index.read_text(encoding="utf-8"))
    differing = sorted(name for name in {*found, *key} if found.get(name) != key.get(name))
    if differing:
        raise ViSpecError(
            f"{folder} holds the results of another run ({', '.join(differing)} differ): choose "
            "another teacher.cache_dir or run.output, or delete it"
        )
