"""Settings that follow others: what "auto" means for a head."""

from __future__ import annotations

from dataclasses import replace

from vllm_vispec.models.spec import QUERY
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.kinds import compressor_of

# The loss of a head: SpecVLM distils with a compressor, ViSpec with its adaptor and without any.
COMPRESSOR_LOSS, OTHER_LOSS = "specvlm", "vispec"


def resolve(config: TrainConfig) -> TrainConfig:
    """The recipe with the loss its head trains on; checks the head's kind and compressor.

    Raises:
        ViSpecError: kind or compressor are unknown or do not go together.
    """
    made_by = compressor_of(config.head.kind, config.head.compressor)
    if config.loss.name != "auto":
        return config
    name = OTHER_LOSS if made_by == QUERY else COMPRESSOR_LOSS
    return replace(config, loss=replace(config.loss, name=name))
