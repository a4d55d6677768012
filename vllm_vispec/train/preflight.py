"""What is known of a run before it costs anything: its data, and whether its settings can work."""

from __future__ import annotations

from vllm_vispec.data.image_bounds import bounds_in, recorded_bounds, same_bounds, set_bounds
from vllm_vispec.data.template import load_processor
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, read_corpus
from vllm_vispec.train.head_types import get_head_type


def prepare(config: TrainConfig) -> tuple[TrainConfig, Corpus]:
    """Read the data of a run; return the recipe with the image bounds that the data decide.

    Raises:
        ViSpecError: files or the target's processor cannot be used, or bounds do not agree.
    """
    corpus = read_corpus(config.data, get_head_type(config.head.kind).text_only)
    where = "data.train"
    recorded = recorded_bounds((entry.conversation for entry in corpus.entries), where)
    wanted = same_bounds(bounds_in(vars(config.data)), recorded, where)
    bounds = set_bounds(load_processor(config.target.model), wanted)
    data = config.data.model_copy(update=bounds)
    return config.model_copy(update={"data": data}), corpus
