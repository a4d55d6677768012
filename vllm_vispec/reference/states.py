"""What the draft hands out for one sequence: its state after a prompt, and a chain from there.

Tensor names end in their shape: N rows, D hidden, Q adaptor queries, R image runs, S chain
entries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_vispec.reference.layers import KVCache
from vllm_vispec.reference.rows import RowPlan


@dataclass(frozen=True)
class Prefill:
    """State of one sequence after its prompt.

    Attributes:
        plan: the compact rows.
        adaptor_RQD: adaptor output of every run.
        global_D: global feature of all later rows (zeros without an image).
        layer_in_ND: input rows of the decoder layer.
        out_ND: output rows; the last one feeds lm_head and the next step.
        cache: keys and values of the compact rows, each [1, G, N, K].
        key_bias_N: what later rows add to the scores of these keys by the gate's decision; None
            for a head without a gate.
    """

    plan: RowPlan
    adaptor_RQD: Tensor
    global_D: Tensor
    layer_in_ND: Tensor
    out_ND: Tensor
    cache: KVCache
    key_bias_N: Tensor | None = None


@dataclass(frozen=True)
class Chain:
    """A greedy chain of S draft tokens.

    Attributes:
        token_ids_S: the tokens.
        logits_SV: logits behind each.
        hidden_SD: draft output behind each (input of lm_head and of the next step).
        layer_in_SD: decoder layer input of the row that produced it.
        positions: RoPE position of that row.
    """

    token_ids_S: Tensor
    logits_SV: Tensor
    hidden_SD: Tensor
    layer_in_SD: Tensor
    positions: tuple[int, ...]
