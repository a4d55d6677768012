"""Where a run's samples get the target's states from: the target itself, or a cache on disk.

Both teachers first count every sample's tokens, and share one folder with all runs on the same
target: `<teacher.cache_dir>/<digest of what the target is and reads>`. Files in it are named by
their content and appear whole, and samples are known by theirs. So a killed job goes on with what
is missing, data may grow, and several runs may use the folder at once. It holds:

* index.json: what the digest stands for;
* lengths-*.json: by sample, its tokens and those of its images, or why it cannot be encoded;
* a folder per dtype with the target's states, see `vllm_vispec.train.cache`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers
from tqdm import tqdm

from vllm_vispec.data.encode import Encoded, Measured, too_long
from vllm_vispec.data.image_bounds import bounds_in
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Rejected
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, Samples, require
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.loader import Loader, Request
from vllm_vispec.train.target import Observed, TargetFacts, TrainingTarget, target_id
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json, write_json

_MEASURED_TOGETHER = 64
T = TypeVar("T")


class Teacher(ABC, Generic[T]):
    """A source of observed samples: made ready in other processes, then observed on the device.

    Attributes:
        facts: what training needs to know of the target.
        lengths: tokens of every usable sample, by its index in the corpus.
        counts: its tokens, and those of its images.
        rejected: samples of the run that cannot be used.
        dtype: in which the target computes.
        folder: see above.

    Raises:
        ViSpecError: target, processor or data cannot be used, no sample is usable, or the folder
            is of an earlier release or cannot be written.
    """

    facts: TargetFacts

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        self._config, self._group = config, group
        self.dtype = target_dtype(config, group)
        processor = load_processor(config.target.model, bounds_in(vars(config.data)))
        self._samples = Samples(corpus, processor, self.dtype)
        self.folder = _claim(config, processor, group)
        used = sorted({*corpus.train, *corpus.validation})
        self._keys = {index: self._samples.key(index) for index in used}
        self.counts: dict[int, Measured] = {}
        rejected, limit = [], config.data.max_length
        for index, found in self._measured().items():
            if "rejected" in found:
                reason = found["rejected"]
            elif found["tokens"] > limit:
                reason = too_long(Measured(**found), limit)
            else:
                self.counts[index] = Measured(**found)
                continue
            rejected.append(Rejected(corpus.entries[index].conversation.sample_id, reason))
        self.lengths = {index: one.tokens for index, one in self.counts.items()}
        self.rejected = tuple(rejected)
        if not self.lengths:
            first = "".join(f" (first: {x.sample_id}: {x.reason})" for x in self.rejected[:1])
            raise ViSpecError(
                f"data.train has no usable sample, {len(self.rejected)} were rejected{first}: "
                "correct the files, data.image_root or data.max_length"
            )
        room = config.data.memory_mb * 2**20
        pin, together = group.device.type == "cuda", config.batch.size
        self._loader = Loader(self._make, config.data.workers, pin, room, together)

    def ready(self, requests: Iterable[Request]) -> Iterator[list[T]]:
        """Make the samples of each request ready, by their indices in the corpus; see `Loader`."""
        return self._loader(requests)

    @abstractmethod
    def _make(self, index: int) -> T:
        """Make a sample ready: what can be done without the device, in another process."""

    @abstractmethod
    def observe(self, ready: Sequence[T]) -> list[Observed]:
        """Return what the target computes for these samples, on the run's device."""

    def _measured(self) -> dict[int, dict[str, Any]]:
        """Count tokens where that is not known yet; return the records of all samples."""
        known = self._known_lengths()
        missing = {key: index for index, key in self._keys.items() if key not in known}
        mine = cut(self._mine(missing), _MEASURED_TOGETHER)
        measure = Loader(self._samples.measure, self._config.data.workers)
        with bar("count tokens", sum(map(len, mine)), self._group) as progress:
            for chunk, found in zip(mine, measure(mine), strict=True):
                records = {
                    self._keys[index]: _record(one) for index, one in zip(chunk, found, strict=True)
                }
                write_json(self.folder / f"lengths-{name_of(records)}.json", records)
                progress.update(len(chunk))
        self._group.wait()
        known = self._known_lengths()
        return {index: known[key] for index, key in self._keys.items()}

    def _mine(self, missing: Mapping[str, int]) -> list[int]:
        """Return this process's share of what is missing, by keys.

        Other processes, and other runs, write meanwhile: each process may see another part missing,
        so a share does not depend on that.
        """
        rank, world = self._group.rank, self._group.world
        return [index for key, index in missing.items() if int(key, 16) % world == rank]

    def _known_lengths(self) -> dict[str, dict[str, Any]]:
        return {
            key: record
            for file in self.folder.glob("lengths-*.json")
            for key, record in read_json(file).items()
        }


class OnlineTeacher(Teacher[Encoded | Rejected]):
    """The target runs in every step; only the samples' lengths are kept on disk."""

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        super().__init__(config, corpus, group)
        self._target = load_target(config, self.dtype, group)
        self.facts = self._target

    def _make(self, index: int) -> Encoded | Rejected:
        return self._samples.encode(index)

    def observe(self, ready: Sequence[Encoded | Rejected]) -> list[Observed]:
        """Run the target on these samples, as one batch."""
        return self._target.observe(require(ready))


def cache_folder(config: TrainConfig) -> Path:
    """Return where a recipe's cache is: beside its output, so that runs share it."""
    return Path(config.teacher.cache_dir or Path(config.run.output).absolute().parent / "cache")


def cut(items: Sequence[int], size: int) -> list[list[int]]:
    """Cut a sequence into pieces; the last may be shorter."""
    return [list(items[first : first + size]) for first in range(0, len(items), size)]


def name_of(keys: Iterable[str]) -> str:
    """Return a name for a file about these samples."""
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]


def bar(text: str, total: int, group: Processes) -> tqdm:
    """Return a progress bar, which the main process alone shows, and only if there is work."""
    return tqdm(total=total, desc=text, unit="sample", disable=not (group.is_main and total))


def _claim(config: TrainConfig, processor: Any, group: Processes) -> Path:
    """Return the folder for this target, and write what it is for."""
    folder = cache_folder(config)
    if (folder / "index.json").is_file():
        raise ViSpecError(
            f"{folder} holds the cache of an earlier release: delete it, or choose another "
            "teacher.cache_dir"
        )
    content = {
        "format": 2,
        "target": target_id(config.target.model),
        "images": processor.image_processor.to_dict(),
        "chat_template": processor.chat_template,
        "transformers": transformers.__version__,
    }
    if config.teacher.engine == "vllm":  # other rounding, and perhaps weights quantised as loaded
        content["engine"] = ["vllm", config.teacher.engine_options.get("quantization")]
    text = json.dumps(content, sort_keys=True, default=str)
    folder = folder / name_of([text])
    if group.is_main and not (folder / "index.json").is_file():
        write_json(folder / "index.json", {"model": config.target.model, **json.loads(text)})
    group.wait()
    return folder


def target_dtype(config: TrainConfig, group: Processes) -> torch.dtype:
    """Return what `target.dtype` means on this device."""
    name = config.target.dtype
    if name == "auto":
        name = "bfloat16" if group.device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_target(config: TrainConfig, dtype: torch.dtype, group: Processes) -> TrainingTarget:
    """Load the target as a recipe wants it; see `TrainingTarget.load`."""
    settings = config.target
    return TrainingTarget.load(settings.model, dtype, str(group.device), settings.attention)


def _record(found: Measured | Rejected) -> dict[str, Any]:
    """A sample's counts as plain data, or why it is left out."""
    return {"rejected": found.reason} if isinstance(found, Rejected) else vars(found)
