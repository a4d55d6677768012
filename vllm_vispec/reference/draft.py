"""What all kinds of drafts in PyTorch share: training, simulation and export treat them alike.

Tensor names end in their shape: S chain entries, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.heads.config import HeadConfig


class Draft(nn.Module, ABC):
    """A draft whose parameter names are the canonical tensor names.

    Attributes:
        config: shape and flags.
        compressor: makes an image's tokens; None for a draft without one.
    """

    config: HeadConfig
    compressor: ImageCompressor | None

    @abstractmethod
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def weight(self) -> Tensor:
        """One of its parameters, which tells their device and dtype."""
        return next(self.parameters())

    def blank(self) -> Draft:
        """Return a draft of this shape; its weights are yet to be set."""
        return type(self)(self.config)

    @abstractmethod
    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """Return the matrix that turns the draft's states into logits.

        Args:
            target_VD: the target's lm_head, or its rows of `token_ids_V`.
            token_ids_V: the tokens that may be proposed; None: all.

        Returns:
            [V, D of the draft], one row per token of `target_VD`. A table of the draft's own may
            have fewer rows than `target_VD`, whose last ones then stand for no tokens.
        """

    @abstractmethod
    def distinct_passes(self, passes: int) -> int:
        """Return how many of `passes` rollout passes differ; later ones equal the last of them."""


@dataclass(frozen=True)
class Chain:
    """A greedy chain of S draft tokens.

    Attributes:
        token_ids_S: the tokens.
        logits_SV: logits behind each token.
        hidden_SD: draft output behind each token (input of lm_head and of the next step).
        layer_in_SD: decoder layer input of the row that produced it.
        positions: RoPE position of that row.
    """

    token_ids_S: Tensor
    logits_SV: Tensor
    hidden_SD: Tensor
    layer_in_SD: Tensor
    positions: tuple[int, ...]


class ChainBuilder:
    """Makes a `Chain` token by token."""

    def __init__(self, first_position: int, lm_head_VD: Tensor) -> None:
        self._first, self._lm_head_VD = first_position, lm_head_VD
        self._entries: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, hidden_D: Tensor, layer_in_D: Tensor) -> Tensor:
        """Add the token that a draft output proposes; return its id."""
        logits_V = self._lm_head_VD @ hidden_D
        token = logits_V.argmax()
        self._entries.append((token, logits_V, hidden_D, layer_in_D))
        return token

    def build(self) -> Chain:
        """Return the chain."""
        ids, logits, hidden, inputs = map(torch.stack, zip(*self._entries, strict=True))
        positions = tuple(range(self._first, self._first + len(self._entries)))
        return Chain(ids, logits, hidden, inputs, positions)
