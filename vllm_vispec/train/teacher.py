"""The teacher modes: the target in this process, or its states on disk. One switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_vispec.data.encode import load_processor
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.batch import Observed
from vllm_vispec.train.cache import offline_teacher
from vllm_vispec.train.chunks import Record, finish_chunks
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, EncodedSamples
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.source import (
    Facts,
    Teacher,
    load_target,
    record_of,
    require_usable,
    source_key,
    split_records,
)

SCAN_SAMPLES = 256


class OnlineTeacher:
    """The target runs in every step; only the samples' lengths are kept on disk.

    Raises:
        ViSpecError: the target or its processor cannot be used, or no sample is usable.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        load_target_config(config.target.model)
        self._samples = EncodedSamples(corpus, load_processor(config.target.model), config.data)
        folder = Path(config.run.output) / "lengths"
        key, count = source_key(config, corpus), len(corpus.entries)
        records = finish_chunks(folder, key, count, SCAN_SAMPLES, group, self._scan)
        self.lengths, self.rejected = split_records(records)
        require_usable(self.lengths, self.rejected)
        self._target = load_target(config, group)
        self.facts = Facts.of(self._target)

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Run the target on these samples, as one batch."""
        return self._target.observe([self._samples.require(index) for index in indices])

    def _scan(self, number: int, indices: range) -> list[Record]:
        return [record_of(index, self._samples(index)) for index in indices]


TEACHERS: Mapping[str, Callable[[TrainConfig, Corpus, Processes], Teacher]] = {
    "online": OnlineTeacher,
    "offline": offline_teacher,
}


def open_teacher(config: TrainConfig, corpus: Corpus, group: Processes) -> Teacher:
    """The teacher that `teacher.mode` names."""
    return TEACHERS[config.teacher.mode](config, corpus, group)
