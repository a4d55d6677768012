"""Weights of a head in units of the target's states and embeddings, which a few samples show.

Their sizes differ between targets: the root mean square of states is 1 for one and 7 for another,
and a token's embedding may be a hundredth of that. A fresh head is trained as if both were 1. Its
weights then have the sizes for which layers are initialised and rates are known, attention is not
saturated before the first step, and tokens are not drowned by states. States that are n times as
large, with an lm_head that is 1 / n times as large, are the same target and give the same head.

Tensor names end in their shape: B samples, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import image_mask
from vllm_vispec.train.target import DraftBatch
from vllm_vispec.train.teacher import Teacher

# What adds to a state grows with it; what reads one without a norm before shrinks.
_GROWS = (
    "fc.bias",
    "img_fc.bias",
    "img_adaptor.o_proj.weight",
    "layer.self_attn.o_proj.weight",
    "layer.mlp.down_proj.weight",
    "norm.weight",
)
_SHRINKS = ("compressor.gate.in_proj.weight",)
_SHRINKS_WITHOUT_NORM = tuple(f"layer.self_attn.{name}_proj.weight" for name in "qkv")


class Units(NamedTuple):
    """Sizes of the target's states and of its tokens' embeddings."""

    state: float = 1.0
    embed: float = 1.0

    def of_batch(self, batch: DraftBatch) -> DraftBatch:
        """Return a batch in these units; embeddings of images stay as they are."""
        if self == Units():
            return batch
        embeds_BLD = batch.embeds_BLD
        if self.embed != 1:
            is_image_BL = image_mask(batch.runs, embeds_BLD.shape[1]).to(embeds_BLD.device)
            embeds_BLD = torch.where(is_image_BL[..., None], embeds_BLD, embeds_BLD / self.embed)
        return replace(batch, hidden_BLD=batch.hidden_BLD / self.state, embeds_BLD=embeds_BLD)

    def to_target(self, weights: Mapping[str, Tensor], config: HeadConfig) -> Mapping[str, Tensor]:
        """Return the weights of a head that computes the same, in the target's units, without them.

        Args:
            weights: in these units, by canonical name.
            config: of the head.
        """
        if self == Units():
            return weights
        shrinks = _SHRINKS if config.layer0_input_norm else _SHRINKS + _SHRINKS_WITHOUT_NORM
        found = dict(weights)
        for names, factor in ((_GROWS, self.state), (shrinks, 1 / self.state)):
            found |= {name: weights[name] * factor for name in names if name in weights}
        # The half that reads embeddings adds to a state, too.
        embed_DD, state_DD = weights["fc.weight"].split(config.hidden_size, dim=1)
        found["fc.weight"] = torch.cat((embed_DD * (self.state / self.embed), state_DD), dim=1)
        return found


def units_of(config: HeadConfig, state_size: float, embed_size: float) -> Units:
    """Return the units that a fresh head is trained in.

    Where `fc` reads embeddings of images, too, those of tokens have no size of their own.
    """
    apart = config.compress and config.compressor_spec.makes_layer_inputs
    return Units(state_size, embed_size if apart else 1.0)


SAMPLES = 16


class Probe(NamedTuple):
    """What a few samples show.

    Attributes:
        rows: counted rows of a sample, on average.
        state_size, embed_size: root mean square of the target's states and embeddings at answer
            tokens.
    """

    rows: float
    state_size: float
    embed_size: float


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """Return so many of the numbers, evenly spread over them."""
    count = min(count, len(numbers))
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


def probe(teacher: Teacher[Any], indices: Sequence[int]) -> Probe:
    """Look at samples of every length, the same ones on every process.

    Args:
        indices: samples of the run, of which `SAMPLES` are taken.
    """
    by_length = sorted(indices, key=lambda index: (teacher.lengths[index], index))
    chosen = spread(by_length, SAMPLES)
    rows, tokens, squares = 0, 0, [0.0, 0.0]
    # One at a time: this fits wherever training does.
    for ready in teacher.ready([index] for index in chosen):
        (observed,) = teacher.observe(ready)
        # Row p predicts token p + 2.
        rows += int(observed.answer[2:].sum())
        tokens += int(observed.answer.sum())
        for number, values_LD in enumerate((observed.hidden_LD, observed.embeds_LD)):
            squares[number] += float(values_LD[observed.answer].float().square().mean(-1).sum())
    return Probe(max(rows, 1) / len(chosen), *((one / max(tokens, 1)) ** 0.5 for one in squares))
