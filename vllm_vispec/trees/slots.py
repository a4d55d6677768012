"""KV slots behind a request's last token for the draft passes over its tree.

vLLM reserves as many as there are draft tokens.  A tree's passes may need more: one for every node
that is expanded.
"""

from collections.abc import Callable
from typing import Any

from vllm_vispec.trees.setting import read_tree


def num_lookahead_tokens(original: Callable[[Any], int], config: Any) -> int:
    """Stands for ``VllmConfig.num_lookahead_tokens``; without trees it says what vLLM says."""
    tree = read_tree(config)
    reserved = int(original(config))
    return reserved if tree is None else max(reserved, tree.draft_slots)
