"""KV slots behind a request's last token for the draft passes over its tree.

vLLM reserves as many as there are draft tokens.  A tree's passes may need more: one for every node
that is expanded.
"""

from typing import Any

from vllm.config import VllmConfig

from vllm_vispec.engine.trees.setting import read_tree

_DONE = "_vispec_tree_slots"


def install() -> None:
    """Wrap ``VllmConfig.num_lookahead_tokens`` once; without trees it says what vLLM says."""
    original = VllmConfig.num_lookahead_tokens
    if getattr(original.fget, _DONE, False):
        return

    def num_lookahead_tokens(config: Any) -> int:
        tree = read_tree(config)
        reserved = int(original.fget(config))
        return reserved if tree is None else max(reserved, tree.draft_slots)

    setattr(num_lookahead_tokens, _DONE, True)
    VllmConfig.num_lookahead_tokens = property(num_lookahead_tokens)
