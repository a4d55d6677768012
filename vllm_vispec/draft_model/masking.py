"""Image rows that a published model does not see: masked in all its attention layers.

As in `models.attention`, heads are a few channels wider: queries hold a constant there, a masked
row's key its negative. The layers are the model's own, built on the padded backends that trees use;
the channels lie behind those of node codes.

Shapes: T tokens, H heads, K key/value heads, h head size, P padded head size, M mask channels.
"""

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.trees.codes import STRENGTH, CodeBuffers, PaddedBuffer, Shape
from vllm_vispec.trees.limits import has_branches, settings_of


class MaskBuffers(CodeBuffers):
    """The padded buffers of a draft's layers; those of the target are others.

    Made where the model is built, with its dtype and device as defaults.
    """

    setting = "images"
    has_masks = True

    def __init__(self, vllm_config: Any) -> None:
        tree = settings_of(vllm_config) if has_branches(vllm_config) else None
        super().__init__(
            tree.levels if tree else 0,
            tree.top_k if tree else 1,
            vllm_config.scheduler_config.max_num_batched_tokens,
            torch.get_default_dtype(),
            torch.get_default_device(),
        )
        self._key_channels: list[torch.Tensor] = []
        self._num_masked = 0

    def query_buffer(self, shape: Shape) -> PaddedBuffer:
        """Return what all layers of a shape fill with queries ``[T, H, P]``."""
        buffer = super().query_buffer(shape)
        self._mask_channels(buffer, shape).fill_(STRENGTH)
        return buffer

    def key_buffer(self, shape: Shape) -> PaddedBuffer:
        """Return what all layers of a shape fill with keys ``[T, K, P]``."""
        buffer = super().key_buffer(shape)
        if len(self._keys) > len(self._key_channels):
            self._key_channels.append(self._mask_channels(buffer, shape))
        return buffer

    def write_masks(self, is_masked_T: torch.Tensor) -> None:
        """Mask rows of the next pass, bool ``[T]`` on the host; all others are seen."""
        self.clear_masks()
        if bool(is_masked_T.any()):
            self._num_masked = len(is_masked_T)
            mask_T = async_tensor_h2d(is_masked_T, self.key_table.device)
            for channels_TKM in self._key_channels:
                channels_TKM[: self._num_masked] = mask_T[:, None, None] * -STRENGTH

    def clear_masks(self) -> None:
        """Let all rows be seen."""
        for channels_TKM in self._key_channels if self._num_masked else ():
            channels_TKM[: self._num_masked].zero_()
        self._num_masked = 0

    def _mask_channels(self, buffer: PaddedBuffer, shape: Shape) -> torch.Tensor:
        return buffer.rows[..., shape[1] + self.num_channels :]
