"""Which branches of a gated compressor each request's drafts see.

The gate reads the target's state of the last prompt token, in the step in which that token is in
the batch: once per request, whatever came before it from the cache. The choice stays on the device
under the request's id, also while the request waits preempted; it resumes behind its prompt without
that row if the cache has the prompt.

Tensor names end in their shape: T tokens of the batch, C requests decided, K branches, D hidden.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.gated_attention import query_scale
from vllm_vispec.spec_decode.row_table import GatedRowTable

if TYPE_CHECKING:
    from vllm_vispec.models.vispec import DraftModel


class Choices:
    """Least-recently-used map from a request to its row of the table of choices.

    Args:
        compressor: A gated one.
        rows: The draft's row table, which holds the choices.
        head_dim: Of the draft's attention, unpadded.
    """

    def __init__(self, compressor: ImageCompressor, rows: GatedRowTable, head_dim: int) -> None:
        self._compressor, self._rows, self._scale = compressor, rows, query_scale(head_dim)
        self._free = list(range(rows.query_code.shape[0] - 1, 0, -1))
        self._choices: OrderedDict[str, int] = OrderedDict()
        # Grows with every decision: what the device holds of a choice may have changed.
        self.version = 0

    @classmethod
    def of(cls, model: "DraftModel") -> "Choices | None":
        """For a draft; None if it has no gate."""
        if model.compressor is None or not isinstance(model.rows, GatedRowTable):
            return None
        return cls(model.compressor, model.rows, model.head.head_dim)

    def choice_of(self, request_id: str) -> int:
        """Return the request's choice, 0 if nothing was decided for it."""
        choice = self._choices.get(request_id)
        if choice is None:
            return 0
        self._choices.move_to_end(request_id)
        return choice

    @torch.inference_mode()
    def decide(self, ends: Sequence[tuple[str, int]], hidden_TD: torch.Tensor) -> None:
        """Decide for requests whose last prompt token is in the batch.

        Args:
            ends: Ids, and where in the batch that token is.
            hidden_TD: The target's states after its final norm.
        """
        if not ends:
            return
        self.version += 1
        choices = [self._take(request_id) for request_id, _ in ends]
        both = [choices, [row for _, row in ends]]
        choices_C, row_C = async_tensor_h2d(both, hidden_TD.device, torch.int64)
        bias_CK = self._compressor.decide(hidden_TD[row_C]).bias_GK
        self._rows.decide(choices_C, bias_CK * self._scale)

    def _take(self, request_id: str) -> int:
        """The request's row, else a free one, else that of the request unheard of for longest."""
        choice = self._choices.pop(request_id, None)
        if choice is None:
            choice = self._free.pop() if self._free else self._choices.popitem(last=False)[1]
        self._choices[request_id] = choice
        return choice
