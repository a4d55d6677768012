"""Device-side table of what each image contributes to the draft, keyed by image hash.

The vision tower does not run for an image whose tokens are a prefix-cache hit, yet every text row
behind the image needs its global feature.  The table keeps, per image (or per run of touching
images), the adaptor's output in the form the draft consumes, for as long as there is room.

Shapes: Q num_query_tokens, N embeddings of one item, D hidden size, H heads, h head size.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_vispec.spec_decode.adaptor import (
    AdaptorPartial,
    ImageAdaptor,
    TextFusion,
    merge_partials,
)
from vllm_vispec.spec_decode.connectors import note_connector, remedy_for_missing
from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

RunKey = tuple[FeatureSlice, ...]


@dataclass
class TableStats:
    """Counters since start: how often a run was needed and how it was served."""

    hits: int = 0
    computed: int = 0
    misses: int = 0
    evicted: int = 0


class ImageTable:
    """Least-recently-used map from a run of images to a slot of the draft's row table.

    Args:
        rows: The draft's row table; its slot 0 is "no image".
        fusion: Turns an image's global feature into what it adds to text rows.
        adaptor: Turns an image's embeddings into rows. None for a head without one, whose table is
            never asked.
        connector: The KV connector that may bring prompts without their images' features.
    """

    def __init__(
        self,
        rows: RowTable,
        fusion: TextFusion | None,
        adaptor: ImageAdaptor | None,
        connector: str | None = None,
    ) -> None:
        self._rows, self._fusion, self._adaptor = rows, fusion, adaptor
        self._connector, num_slots = connector, rows.ids.num_slots
        if adaptor is not None and connector is not None:
            note_connector(connector)
        self._free = list(range(num_slots - 1, 0, -1))
        self._slots: OrderedDict[RunKey, int] = OrderedDict()
        self._partials: OrderedDict[FeatureSlice, AdaptorPartial] = OrderedDict()
        self._max_partials = num_slots
        self._in_use: set[int] = set()
        self.stats = TableStats()

    def clear(self) -> None:
        """Forget every image, e.g. because the vision tower's weights changed."""
        self._free.extend(self._slots.values())
        self._slots.clear()
        self._partials.clear()

    def begin_step(self) -> None:
        """Start a batch: slots handed out from now on stay until the next call."""
        self._in_use.clear()

    def slot_of(self, run: ImageRun, embeddings: Mapping[str, torch.Tensor]) -> int | None:
        """Return the run's slot, computing its rows if the embeddings are at hand.

        None if they are not, or if this batch already needs every slot.

        Args:
            run: The run, identified by the slices of vision-tower output it consists of.
            embeddings: Vision-tower output by item hash, ``[N, >= D]`` each; the first D columns
                are the embeddings (deepstack towers append more).
        """
        slot = self._slots.get(run.parts)
        if slot is not None:
            self._slots.move_to_end(run.parts)
            self.stats.hits += 1
        else:
            slot = self._compute(run, embeddings)
        if slot is not None:
            self._in_use.add(slot)
        return slot

    def _compute(self, run: ImageRun, embeddings: Mapping[str, torch.Tensor]) -> int | None:
        partials = [self._partial(part, embeddings) for part in run.parts]
        available = [partial for partial in partials if partial is not None]
        if len(available) < len(partials):
            return None
        slot = self._take_slot()
        if slot is None:
            return None
        self.stats.computed += 1
        assert self._adaptor is not None
        assert self._fusion is not None
        rows_QD = self._adaptor.project(merge_partials(available))
        self._rows.write_image(slot, self._fusion.offset(rows_QD[-1]), rows_QD[:-1])
        self._slots[run.parts] = slot
        return slot

    def count_miss(self, run: ImageRun) -> None:
        """Record that rows behind ``run`` are drafted without its image."""
        self.stats.misses += 1
        if self.stats.misses & (self.stats.misses - 1) == 0:
            logger.warning(
                "ViSpec: %d image lookups found neither table entry nor embeddings (last: %s); "
                "drafts behind those images ignore them. Output is unaffected, acceptance is. %s",
                self.stats.misses,
                run.parts[0].identifier,
                remedy_for_missing(self._connector, has_room=bool(self._free)),
            )

    def _take_slot(self) -> int | None:
        """A free slot, else the least recently used one that this batch does not need."""
        if self._free:
            return self._free.pop()
        for key, slot in self._slots.items():
            if slot not in self._in_use:
                del self._slots[key]
                self.stats.evicted += 1
                return slot
        return None

    def _partial(
        self, part: FeatureSlice, embeddings: Mapping[str, torch.Tensor]
    ) -> AdaptorPartial | None:
        """Attention over one item, remembered so that touching images need not coexist."""
        partial = self._partials.get(part)
        if partial is not None:
            self._partials.move_to_end(part)
            return partial
        output_ND = embeddings.get(part.identifier)
        if output_ND is None:
            return None
        assert self._adaptor is not None
        partial = self._adaptor.attend(output_ND[part.start : part.stop])
        self._partials[part] = partial
        if len(self._partials) > self._max_partials:
            self._partials.popitem(last=False)
        return partial
