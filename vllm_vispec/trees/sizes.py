"""Sizes of trees: what settings and codes share. Imports neither PyTorch nor pydantic."""

from itertools import count
from math import comb

MAX_SIBLINGS = 10
MAX_DEPTH = 15
# vLLM's rejection sampler (V1) takes at most 128 draft tokens a request.
MAX_NODES = 127


def channels_per_level(siblings: int) -> int:
    """Return the head channels n that tell children apart, see `codes`; 0 for only one."""
    return next(n for n in count() if comb(n, n // 2) >= siblings)
