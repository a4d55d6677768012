"""What every draft in PyTorch can do: both kinds are trained, simulated and exported alike.

Tensor names end in their shape: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.heads import inspect_head, iter_canonical_tensors
from vllm_vispec.heads.config import HeadConfig


class Draft(nn.Module, ABC):
    """A draft whose parameter names are the canonical tensor names.

    Attributes:
        config: its shape and flags; a subclass is made from one.
        compressor: what makes an image's tokens; None without.
    """

    config: HeadConfig
    compressor: ImageCompressor | None

    @abstractmethod
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Load a head of any dialect.

        Raises:
            ViSpecError: see `vllm_vispec.heads.inspect_head`.
        """
        draft = cls(inspect_head(folder).config)
        draft.load_state_dict(dict(iter_canonical_tensors(folder)))
        return draft.to(dtype)

    @property
    def weight(self) -> Tensor:
        """Any of its parameters, for their device and dtype."""
        return next(self.parameters())

    @abstractmethod
    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """What turns the draft's states into logits.

        Args:
            target_VD: the target's lm_head, or its rows of `token_ids_V`.
            token_ids_V: the tokens that may be proposed; None: all.

        Returns:
            [V, D of the draft], one row per token of `target_VD`.
        """

    @abstractmethod
    def distinct_passes(self, passes: int) -> int:
        """How many of so many rollout passes differ; all later ones equal the last of them."""
