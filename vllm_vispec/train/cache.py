"""The offline teacher: the target's states on disk, computed once and shared by runs.

A folder holds for a target, in one dtype (floats are as the target computed them, so offline
equals online):

* tables.safetensors: `embed_tokens` [V, D] and `lm_head` [V, D];
* target/config.json: the target's configuration;
* shard-*.safetensors: of sample number i its `i.token_ids` int32 [L], `i.answer` bool [L],
  `i.hidden` [S, D] and, of the input embeddings, only the rows that are not simply the token's row
  of the embedding table (images): `i.rows` int32 [N] and `i.embeds` [N, D];
* shard-*.json: which samples these are. It is written last.

S is L, or the tokens that are in no image, with the last one of each image: compressing heads and
draft VLMs read no other states. Tensor names end in their shape.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vllm_vispec.data.encode import Measured
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, require
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.engine_target import ENGINE_BATCH, EngineTarget
from vllm_vispec.train.head_types import get_head_type
from vllm_vispec.train.loader import Loader
from vllm_vispec.train.target import Observed, Runs, TargetFacts, TrainingTarget
from vllm_vispec.train.teacher import OnlineTeacher, Teacher, bar, cut, load_target, name_of
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json, read_tensors, sweep, write_json, write_tensors

ABANDONED_S = 24 * 3600.0
"""What nobody has written to for so long was left by a killed run."""


@dataclass(frozen=True)
class _Place:
    """Where a sample's states are: number `number` of a shard; `whole`: those of image rows too."""

    shard: Path
    number: int
    runs: Runs
    whole: bool


class OfflineTeacher(Teacher[dict[str, Any]]):
    """Reads the target's states from the cache, which it completes first."""

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        super().__init__(config, corpus, group)
        self._whole = _reads_image_states(config)
        self._families = {i: corpus.entries[i].conversation for i in self.lengths}
        self._states = self.folder / str(self.dtype).removeprefix("torch.")
        self._places = self._complete()
        found = read_tensors(self._states / "tables.safetensors")
        tables = {name: one.to(group.device) for name, one in found.items()}
        target = load_target_config(self._states / "target")
        self.facts = TargetFacts(
            target.model_type,
            target.get_text_config(),
            tables["embed_tokens"],
            tables["lm_head"],
        )

    def _make(self, index: int) -> dict[str, Any]:
        """Read a sample."""
        place = self._places[self._keys[index]]
        names = ("token_ids", "answer", "hidden", "rows", "embeds")
        try:
            with safe_open(str(place.shard), framework="pt") as file:
                found = {name: file.get_tensor(f"{place.number}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise ViSpecError(
                f"{place.shard} cannot be read ({error}): delete it and run the same command again"
            ) from error
        found["states"] = stored_rows(len(found["token_ids"]), place.runs, place.whole)
        # A tensor comes out of another process through a file and a socket of its own, which costs
        # more than copying the small ones as arrays.
        large = {name: found.pop(name) for name in ("hidden", "embeds")}
        return large | {name: tensor.numpy() for name, tensor in found.items()} | {"index": index}

    def observe(self, ready: Sequence[Mapping[str, Any]]) -> list[Observed]:
        """Put samples together on the device; states that are not stored are zeros."""
        return [self._observe(one) for one in ready]

    def _observe(self, ready: Mapping[str, Any]) -> Observed:
        on_device = {
            name: torch.as_tensor(values).to(self._group.device, non_blocking=True)
            for name, values in ready.items()
        }
        token_ids = on_device["token_ids"].long()
        embeds_LD = self.facts.embed_VD[token_ids]
        embeds_LD[on_device["rows"].long()] = on_device["embeds"]
        hidden_LD = torch.zeros_like(embeds_LD)
        hidden_LD[on_device["states"]] = on_device["hidden"]
        index = ready["index"]
        conversation = self._families[index]
        return Observed(
            sample_id=conversation.sample_id,
            family=conversation.family,
            token_ids=token_ids,
            answer=on_device["answer"],
            runs=self._places[self._keys[index]].runs,
            embeds_LD=embeds_LD,
            hidden_LD=hidden_LD,
        )

    def _complete(self) -> dict[str, _Place]:
        """Let the target compute what is missing; return where every sample is."""
        config, group = self._config, self._group
        known = self._known_places()
        missing = {
            key: i for i, key in self._keys.items() if i in self.lengths and key not in known
        }
        has_tables = (self._states / "tables.safetensors").is_file()
        group.wait()  # every process has looked for tables before one writes them
        in_engine = config.teacher.engine == "vllm"
        if in_engine and group.world > 1 and (missing or not has_tables):
            raise ViSpecError(
                f"{len(missing)} samples have no states yet, and vLLM takes the GPUs itself: store "
                "them with one process first, by vispec train --cache-only"
            )
        together = ENGINE_BATCH if in_engine else config.batch.size
        mine = [
            cut(sorted(chunk, key=self.lengths.__getitem__), together)  # against padding
            for chunk in cut(self._mine(missing), config.teacher.shard_samples)
        ]
        if group.is_main:
            for folder in (self.folder, self._states):
                sweep(folder, ABANDONED_S)
        if missing and group.is_main:
            self._check_disk(list(missing.values()))
        if mine or (group.is_main and not has_tables):
            start = EngineTarget.start if in_engine else load_target
            target = start(config, self.dtype, group)
            if group.is_main and not has_tables:
                _write_tables(self._states, target)
            self._fill(mine, target)
            target.stop()
        group.wait()
        return self._known_places()

    def _fill(self, chunks: Sequence[Sequence[Sequence[int]]], target: TrainingTarget) -> None:
        """Write one shard per chunk; a chunk is a list of batches."""
        batches = [batch for chunk in chunks for batch in chunk]
        pin = self._group.device.type == "cuda"
        together = max(map(len, batches), default=1)
        workers = self._config.data.workers
        ready = Loader(self._samples.encode, workers, pin, together=together)(batches)
        with bar("store states", sum(map(len, batches)), self._group) as progress:
            for chunk in chunks:
                tensors: dict[str, Tensor] = {}
                records: list[dict[str, Any]] = []
                for batch in chunk:
                    encoded = require(next(ready))
                    for index, one in zip(batch, target.observe(encoded), strict=True):
                        packed = _pack(one, self._whole, target.embed_VD)
                        tensors |= {f"{len(records)}.{name}": x for name, x in packed.items()}
                        key = self._keys[index]
                        records.append({"key": key, "runs": one.runs, "whole": self._whole})
                    progress.update(len(batch))
                content = [str(self._whole), *(one["key"] for one in records)]
                shard = self._states / f"shard-{name_of(content)}"
                write_tensors(shard.with_suffix(".safetensors"), tensors)
                write_json(shard.with_suffix(".json"), records)

    def _known_places(self) -> dict[str, _Place]:
        """Where every sample is whose states suffice for this run's head."""
        found = {}
        for file in sorted(self._states.glob("shard-*.json")):
            if not file.with_suffix(".safetensors").is_file():
                continue  # deleted, so it is made again
            for number, record in enumerate(read_json(file)):
                runs = tuple((start, end) for start, end in record["runs"])
                place = _Place(file.with_suffix(".safetensors"), number, runs, record["whole"])
                if place.whole or not self._whole:
                    found[record["key"]] = place
        return found

    def _check_disk(self, indices: Sequence[int]) -> None:
        """Say how much will be written, before it begins.

        Raises:
            ViSpecError: the disk has no room for it.
        """
        needed = bytes_of(self._config, (self.counts[index] for index in indices), self.dtype)
        free = shutil.disk_usage(self.folder).free
        where = (
            f"{needed / 1e9:.3g} GB of hidden states for {len(indices)} samples in {self._states}"
        )
        if needed > free:
            raise ViSpecError(
                f"the offline teacher would write {where}, {free / 1e9:.3g} GB are free: free "
                "space, set teacher.cache_dir to a larger disk, or teacher.mode to online"
            )
        tqdm.write(f"write {where} ({free / 1e9:.3g} GB free)")


def _reads_image_states(config: TrainConfig) -> bool:
    kind = get_head_type(config.head.kind)
    return not (kind.compress or kind.draft_vlm)


def bytes_of(config: TrainConfig, counts: Iterable[Measured], dtype: torch.dtype) -> int:
    """Return what the states of samples take."""
    text, whole = (
        load_target_config(config.target.model).get_text_config(),
        _reads_image_states(config),
    )
    rows = sum(one.tokens + whole * one.image_tokens for one in counts)
    return int(rows * text.hidden_size * dtype.itemsize)


def stored_rows(length: int, runs: Runs, whole: bool) -> Tensor:
    """Return the tokens whose states are stored: int64, ascending."""
    kept_L = torch.ones(length, dtype=torch.bool)
    for start, end in () if whole else runs:
        kept_L[start : end - 1] = False
    return kept_L.nonzero()[:, 0]


def _pack(observed: Observed, whole: bool, embed_VD: Tensor) -> dict[str, Tensor]:
    rows_N = (observed.embeds_LD != embed_VD[observed.token_ids]).any(dim=1).nonzero()[:, 0]
    stored = stored_rows(len(observed.token_ids), observed.runs, whole)
    found = {
        "token_ids": observed.token_ids.to(torch.int32),
        "answer": observed.answer,
        "hidden": observed.hidden_LD[stored.to(rows_N.device)],
        "rows": rows_N.to(torch.int32),
        "embeds": observed.embeds_LD[rows_N],
    }
    return {name: tensor.cpu() for name, tensor in found.items()}


def _write_tables(folder: Path, target: TrainingTarget) -> None:
    load_target_config(target.folder).save_pretrained(folder / "target")
    lm_head_VD = target.lm_head_VD.clone()  # perhaps the same tensor
    write_tensors(
        folder / "tables.safetensors", {"embed_tokens": target.embed_VD, "lm_head": lm_head_VD}
    )


def open_teacher(
    config: TrainConfig, corpus: Corpus, group: Processes, *, may_store: bool = True
) -> Teacher[Any]:
    """Return the teacher that `teacher.mode` names.

    Args:
        may_store: the draft can be trained offline, too; then many epochs get a hint to do so.
    """
    if config.teacher.mode == "offline":
        return OfflineTeacher(config, corpus, group)
    teacher, epochs = OnlineTeacher(config, corpus, group), config.schedule.epochs
    if group.is_main and may_store and epochs > 2:
        size = bytes_of(config, teacher.counts.values(), teacher.dtype)
        tqdm.write(
            f"the target runs in each of {epochs:g} epochs: teacher.mode=offline runs it once and "
            f"stores its states, {size / 1e9:.3g} GB"
        )
    return teacher
