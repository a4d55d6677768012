"""The gate over whole sequences, in training and the reference: turns, decisions, key biases.

A turn is one answer with the prompt before it. Its gate reads the target's state at the prompt's
last token, row a - 1 of an answer that begins at token a, and holds for all rows from there to the
next turn's. Rows before the first gate see every branch as it is; in a draft of one layer nothing
depends on what they see. An answer at token 0 has no prompt: its gate reads token 0.

Tensor names end in their shape: B samples, L rows (= tokens), N rows from some row on, G turns of
all samples, K branches, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.gate import GateOutput, gumbel_noise


@dataclass(frozen=True)
class Decision:
    """What the gate decided for the turns of a batch.

    Attributes:
        output: of all turns, sample after sample.
        turn_BL: int64, the turn that a row belongs to; G before the first of its sample.
        sees_G: bool, turns with an image before them; a decision means nothing for the others.
    """

    output: GateOutput
    turn_BL: Tensor
    sees_G: Tensor

    def of_images(self) -> GateOutput:
        """The decisions of turns with an image before them."""
        one, kept = self.output, self.sees_G
        return GateOutput(one.bias_GK[kept], one.share_GK[kept], one.choice_G[kept])

    def key_bias(self, branch_BL: Tensor) -> KeyBias:
        """What rows add to the scores of keys, given the branch of every row (-1: none)."""
        return KeyBias(F.pad(self.output.bias_GK, (0, 0, 0, 1))[self.turn_BL], branch_BL)


@dataclass(frozen=True)
class KeyBias:
    """Biases by query row and branch of the key.

    Attributes:
        row_BLK: float32.
        branch_BL: int64, the branch of a row's key, -1 for one that is never biased.
    """

    row_BLK: Tensor
    branch_BL: Tensor

    def scores(self, first: int = 0) -> Tensor:
        """Float32 [B, N, L] for rows from `first` on: as large as a head's attention scores."""
        index_K = torch.arange(self.row_BLK.shape[-1], device=self.branch_BL.device)
        is_branch_BLK = (self.branch_BL[..., None] == index_K).to(self.row_BLK)
        with torch.autocast(self.row_BLK.device.type, enabled=False):
            return self.row_BLK[:, first:] @ is_branch_BLK.transpose(1, 2)


def gate_rows(answer_BL: Tensor) -> Tensor:
    """Rows whose state a gate reads, one per answer: bool [B, L]."""
    starts_BL = answer_BL & ~F.pad(answer_BL[:, :-1], (1, 0))
    read_BL = F.pad(starts_BL[:, 1:], (0, 1))
    read_BL[:, 0] |= starts_BL[:, 0]
    return read_BL


def decide(
    compressor: ImageCompressor | None,
    hidden_BLD: Tensor,
    answer_BL: Tensor,
    runs: Sequence[Sequence[tuple[int, int]]],
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Decision | None:
    """Let a head's gate decide for every turn of a batch; None for a head without a gate.

    Args:
        compressor: the head's.
        hidden_BLD: target hidden states after its final norm.
        answer_BL: bool, tokens of answers.
        runs: images of each sample, in token indices.
        generator: source of Gumbel noise (training); None: no noise (everywhere else).
        temperature: of the softmax that gradients go through.
    """
    if compressor is None or compressor.gate is None:
        return None
    read_BL = gate_rows(answer_BL)
    states_GD = hidden_BLD[read_BL]
    noise_GK = None
    if generator is not None:
        shape = (len(states_GD), len(compressor.spec.primitives))
        noise_GK = gumbel_noise(torch.zeros(shape, device=states_GD.device), generator)
    output = compressor.decide(states_GD, noise_GK, temperature)
    sample_G, row_G = read_BL.nonzero(as_tuple=True)
    first_B = torch.tensor(
        [_first_image_row(one, answer_BL.shape[1]) for one in runs], device=row_G.device
    )
    return Decision(output, _turns(read_BL), row_G >= first_B[sample_G])


def prompt_key_bias(
    compressor: ImageCompressor | None, state_D: Tensor, branch_of_row: Sequence[int]
) -> Tensor | None:
    """What a prompt with this state at its end adds to scores of its rows' keys: float32 [N].

    None for a head without a gate.

    Args:
        branch_of_row: the branch of each of the prompt's compact rows, -1 for none.
    """
    if compressor is None or compressor.gate is None:
        return None
    bias_K = compressor.decide(state_D[None]).bias_GK[0]
    # Branch -1 finds the zero behind the last.
    return F.pad(bias_K, (0, 1))[torch.tensor(branch_of_row, device=bias_K.device)]


def _turns(read_BL: Tensor) -> Tensor:
    """Number of each row's turn among all of the batch, their count before a sample's first."""
    counts_BL = read_BL.long().cumsum(1)
    before_B1 = F.pad(counts_BL[:, -1:].cumsum(0)[:-1], (0, 0, 1, 0))
    total = counts_BL[:, -1].sum()
    return torch.where(counts_BL > 0, before_B1 + counts_BL - 1, total)


def _first_image_row(runs: Sequence[tuple[int, int]], nowhere: int) -> int:
    return min((max(start, 1) - 1 for start, end in runs if end > 1), default=nowhere)
