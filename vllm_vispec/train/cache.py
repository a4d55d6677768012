"""The target's states on disk, so that training needs no target.

The folder holds, beside what `chunks` keeps (index.json and one list of records per shard):

* shard-NNNNN.safetensors: per sample i its `i.token_ids` int32 [L], `i.answer` bool [L],
  `i.hidden` [L, D], and of the input embeddings only the rows that are not simply the token's
  row of the embedding table (images): `i.rows` int32 [N] and `i.embeds` [N, D];
* tables.safetensors: `embed_tokens` [V, D] and `lm_head` [V, D];
* target/config.json: the target's configuration.

Floats are in the dtype in which the target computed them, so offline equals online.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_vispec.data.encode import Encoded, load_processor
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.batch import Observed
from vllm_vispec.train.chunks import Record, finish_chunks
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, EncodedSamples
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.source import (
    Facts,
    load_target,
    record_of,
    require_usable,
    source_key,
    split_records,
    target_dtype,
)
from vllm_vispec.train.target import TrainingTarget
from vllm_vispec.utils.files import read_tensors, write_tensors


def cache_folder(config: TrainConfig) -> Path:
    """Where a recipe's cache is."""
    return Path(config.teacher.cache_dir or Path(config.run.output) / "cache")


def offline_teacher(config: TrainConfig, corpus: Corpus, group: Processes) -> OfflineTeacher:
    """Complete the cache if anything is missing, then read from it.

    Raises:
        ViSpecError: the cache belongs to other data or another target, or cannot be written.
    """
    folder, size = cache_folder(config), config.teacher.shard_samples
    key = source_key(config, corpus) | {"dtype": str(target_dtype(config, group))}
    writer = _Writer(config, corpus, group)
    records = finish_chunks(folder, key, len(corpus.entries), size, group, writer.shard)
    if group.is_main and not _tables(folder).is_file():
        writer.tables()
    group.wait()
    return OfflineTeacher(folder, records, size, group.device)


class OfflineTeacher:
    """Reads a finished cache."""

    def __init__(
        self, folder: Path, records: Sequence[Record], shard_samples: int, device: torch.device
    ) -> None:
        self._folder, self._size, self._device = folder, shard_samples, device
        self._records = {record["index"]: record for record in records}
        self.lengths, self.rejected = split_records(records)
        require_usable(self.lengths, self.rejected)
        tables = read_tensors(_tables(folder))
        config = load_target_config(folder / "target")
        self.facts = Facts(
            config.model_type,
            config.get_text_config(),
            tables["embed_tokens"].to(device),
            tables["lm_head"].to(device),
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


class _Writer:
    """Computes shards; the target is loaded on first use, so a finished cache needs none."""

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        self._config, self._corpus, self._group = config, corpus, group
        self._folder = cache_folder(config)
        self._target: TrainingTarget | None = None
        self._samples: EncodedSamples | None = None

    def shard(self, number: int, indices: range) -> list[Record]:
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
            seen = self._loaded().observe([usable[index] for index in batch])
            for index, observed in zip(batch, seen, strict=True):
                tensors |= self._pack(index, observed)
        if tensors:
            write_tensors(_shard(self._folder, number), tensors)
        return [_record(index, item) for index, item in items.items()]

    def tables(self) -> None:
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


def _record(index: int, item: Any) -> Record:
    record = record_of(index, item)
    if isinstance(item, Encoded):
        record |= {"family": item.family, "runs": [list(run) for run in item.runs]}
    return record


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _tables(folder: Path) -> Path:
    return folder / "tables.safetensors"
