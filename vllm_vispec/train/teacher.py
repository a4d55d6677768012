"""Where a run's samples get the target's states from: the target itself, or a cache on disk.

Both teachers first look at every sample once. That work is cut into chunks which any process does
and which are kept on disk, so a killed job goes on with the chunks that are missing. A folder of
chunks holds index.json (what the results belong to) and one chunk-NNNNN.json per finished chunk, a
list with one record per sample. The cache of the offline teacher holds besides:

* shard-NNNNN.safetensors: per sample i its `i.token_ids` int32 [L], `i.answer` bool [L],
  `i.hidden` [L, D], and of the input embeddings only the rows that are not simply the token's
  row of the embedding table (images): `i.rows` int32 [N] and `i.embeds` [N, D];
* tables.safetensors: `embed_tokens` [V, D] and `lm_head` [V, D];
* target/config.json: the target's configuration.

Floats are in the dtype in which the target computed them, so offline equals online.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_vispec.data.encode import Encoded
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Rejected
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.batch import Observed
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, EncodedSamples
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.target import TargetFacts, TrainingTarget, target_id
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json, read_tensors, write_json, write_tensors

SCAN_SAMPLES = 256
Record = dict[str, Any]


class Teacher(Protocol):
    """A source of observed samples.

    Attributes:
        facts: what training needs to know of the target.
        lengths: tokens of every usable sample, by its index in the corpus.
        rejected: samples that cannot be encoded.
    """

    facts: TargetFacts
    lengths: dict[int, int]
    rejected: tuple[Rejected, ...]

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Return what the target computes for these samples, on the run's device."""
        ...


class OnlineTeacher:
    """The target runs in every step; only the samples' lengths are kept on disk.

    Raises:
        ViSpecError: the target or its processor cannot be used, or no sample is usable.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        load_target_config(config.target.model)
        self._samples = EncodedSamples(corpus, load_processor(config.target.model), config.data)
        folder, key = Path(config.run.output) / "lengths", _source_key(config, corpus)
        records = finish_chunks(folder, key, len(corpus.entries), SCAN_SAMPLES, group, self._scan)
        self.lengths, self.rejected = _split_records(records)
        self._target = load_target(config, group)
        self.facts = TargetFacts.of(self._target)

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Run the target on these samples, as one batch."""
        return self._target.observe([self._samples.require(index) for index in indices])

    def _scan(self, number: int, indices: range) -> list[Record]:
        return [_record_of(index, self._samples(index)) for index in indices]


class OfflineTeacher:
    """Reads the target's states from the cache, which it completes first if anything is missing.

    Raises:
        ViSpecError: the cache belongs to other data or another target, or cannot be written.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        self._folder, self._size = cache_folder(config), config.teacher.shard_samples
        self._device = group.device
        key = _source_key(config, corpus) | {"dtype": str(_target_dtype(config, group))}
        writer = _CacheWriter(config, corpus, group)
        records = finish_chunks(
            self._folder, key, len(corpus.entries), self._size, group, writer.write_shard
        )
        if group.is_main and not _tables(self._folder).is_file():
            writer.write_tables()
        group.wait()
        self._records = {record["index"]: record for record in records}
        self.lengths, self.rejected = _split_records(records)
        tables = read_tensors(_tables(self._folder))
        target_config = load_target_config(self._folder / "target")
        self.facts = TargetFacts(
            target_config.model_type,
            target_config.get_text_config(),
            tables["embed_tokens"].to(group.device),
            tables["lm_head"].to(group.device),
        )

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Read these samples, in the order asked for."""
        found: dict[int, Observed] = {}
        for shard, members in groupby(sorted(set(indices)), key=lambda index: index // self._size):
            with safe_open(str(_shard(self._folder, shard)), framework="pt") as file:
                found.update({index: self._read(file, index) for index in members})
        return [found[index] for index in indices]

    def _read(self, file: Any, index: int) -> Observed:
        def tensor(name: str) -> Tensor:
            return file.get_tensor(f"{index}.{name}").to(self._device)

        record, token_ids = self._records[index], tensor("token_ids").long()
        embeds_LD = self.facts.embed_VD[token_ids]
        embeds_LD[tensor("rows").long()] = tensor("embeds")
        return Observed(
            sample_id=record["id"],
            family=record["family"],
            token_ids=token_ids,
            answer=tensor("answer"),
            runs=tuple((start, end) for start, end in record["runs"]),
            embeds_LD=embeds_LD,
            hidden_LD=tensor("hidden"),
        )


TEACHERS: Mapping[str, Callable[[TrainConfig, Corpus, Processes], Teacher]] = {
    "online": OnlineTeacher,
    "offline": OfflineTeacher,
}


def open_teacher(config: TrainConfig, corpus: Corpus, group: Processes) -> Teacher:
    """Return the teacher that `teacher.mode` names."""
    return TEACHERS[config.teacher.mode](config, corpus, group)


def cache_folder(config: TrainConfig) -> Path:
    """Return where a recipe's cache is."""
    return Path(config.teacher.cache_dir or Path(config.run.output) / "cache")


def load_target(config: TrainConfig, group: Processes) -> TrainingTarget:
    """Return the target of a recipe, on this process's device."""
    return TrainingTarget.load(config.target.model, _target_dtype(config, group), str(group.device))


def finish_chunks(
    folder: Path,
    key: Mapping[str, Any],
    count: int,
    size: int,
    group: Processes,
    work: Callable[[int, range], list[Record]],
) -> list[Record]:
    """Do the chunks that are missing and return the records of all `count` samples in order.

    Args:
        folder: where results are kept.
        key: plain data that says what they belong to.
        size: samples per chunk.
        work: called with a chunk's number and its samples.

    Raises:
        ViSpecError: the folder holds the results of something else, or cannot be written.
    """
    chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
    files = [folder / f"chunk-{number:05d}.json" for number in range(len(chunks))]
    if group.is_main:
        _claim(folder, {**key, "samples": count, "chunk_samples": size})
    group.wait()
    for number in range(group.rank, len(chunks), group.world):
        if not files[number].is_file():
            write_json(files[number], work(number, chunks[number]))
    group.wait()
    return [record for file in files for record in read_json(file)]


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


def _source_key(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What lengths and states of samples depend on."""
    return {
        "format": 1,
        "data": corpus.digest,
        "target": target_id(config.target.model),
        "max_length": config.data.max_length,
    }


def _target_dtype(config: TrainConfig, group: Processes) -> torch.dtype:
    name = config.target.dtype
    if name == "auto":
        name = "bfloat16" if group.device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _record_of(index: int, item: Encoded | Rejected) -> Record:
    """A sample as plain data: its length, or why it is left out."""
    if isinstance(item, Rejected):
        return {"index": index, "id": item.sample_id, "rejected": item.reason}
    return {"index": index, "id": item.sample_id, "length": len(item.token_ids)}


def _split_records(records: Sequence[Record]) -> tuple[dict[int, int], tuple[Rejected, ...]]:
    """Lengths by index, and the rejected samples.

    Raises:
        ViSpecError: every sample was rejected.
    """
    lengths = {one["index"]: one["length"] for one in records if "length" in one}
    rejected = tuple(Rejected(one["id"], one["rejected"]) for one in records if "rejected" in one)
    if not lengths:
        first = f" (first: {rejected[0].sample_id}: {rejected[0].reason})" if rejected else ""
        raise ViSpecError(
            f"data.train has no usable sample, {len(rejected)} were rejected{first}: correct the "
            "files, data.image_root or data.max_length"
        )
    return lengths, rejected


class _CacheWriter:
    """Computes shards; the target is loaded on first use, so a finished cache needs none."""

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        self._config, self._corpus, self._group = config, corpus, group
        self._folder = cache_folder(config)
        self._target: TrainingTarget | None = None
        self._samples: EncodedSamples | None = None

    def write_shard(self, number: int, indices: range) -> list[Record]:
        """Write one shard; returns its records."""
        if self._samples is None:
            processor = load_processor(self._config.target.model)
            self._samples = EncodedSamples(self._corpus, processor, self._config.data)
        items = {index: self._samples(index) for index in indices}
        usable = {index: item for index, item in items.items() if isinstance(item, Encoded)}
        tensors: dict[str, Tensor] = {}
        # Like lengths together, against padding.
        order = sorted(usable, key=lambda index: len(usable[index].token_ids))
        size = self._config.batch.size
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            observed = self._loaded().observe([usable[index] for index in batch])
            for index, one in zip(batch, observed, strict=True):
                tensors |= self._pack(index, one)
        if tensors:
            write_tensors(_shard(self._folder, number), tensors)
        return [
            _record_of(index, item)
            | (
                {"family": item.family, "runs": [list(run) for run in item.runs]}
                if isinstance(item, Encoded)
                else {}
            )
            for index, item in items.items()
        ]

    def write_tables(self) -> None:
        """Write the tables and the configuration."""
        target = self._loaded()
        target.model.config.save_pretrained(self._folder / "target")
        write_tensors(
            _tables(self._folder),
            {"embed_tokens": target.embed_VD, "lm_head": target.lm_head_VD.clone()},
        )

    def _loaded(self) -> TrainingTarget:
        if self._target is None:
            self._target = load_target(self._config, self._group)
        return self._target

    def _pack(self, index: int, observed: Observed) -> dict[str, Tensor]:
        table_LD = self._loaded().embed_VD[observed.token_ids]
        rows_N = (observed.embeds_LD != table_LD).any(dim=1).nonzero()[:, 0]
        return {
            f"{index}.token_ids": observed.token_ids.to(torch.int32),
            f"{index}.answer": observed.answer,
            f"{index}.hidden": observed.hidden_LD.clone(),
            f"{index}.rows": rows_N.to(torch.int32),
            f"{index}.embeds": observed.embeds_LD[rows_N],
        }


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _tables(folder: Path) -> Path:
    return folder / "tables.safetensors"
