"""A child-process job: a padded attention layer of a running engine, fed by hand.

Shapes: T tokens of a sequence, J nodes with the root, H heads, K key/value heads, h head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support import draft_logits, engine

if TYPE_CHECKING:
    import torch

PREFIX, NODES = 437, 29
# Two sequences of one block table: blocks of the tree, then of the plain one.
BLOCKS = 16


@dataclass
class Layer:
    """A target's layer, its keys and values to be, and the queries of all tokens."""

    module: Any
    builder: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(cls, runner: Any, num_tokens: int) -> Layer:
        """Take the first layer of the target that is padded, and make up its inputs."""
        import torch

        from vllm_vispec.engine.trees.attention import padding_of

        groups = [group for groups in runner.attn_groups for group in groups]
        for name, module in runner.compilation_config.static_forward_context.items():
            padding = padding_of(module)
            if padding is not None and padding.kept is not None:
                group = next(group for group in groups if name in group.layer_names)
                generator = torch.Generator().manual_seed(0)
                made = [
                    torch.randn(num_tokens, heads, module.head_size, generator=generator)
                    for heads in (module.num_heads, module.num_kv_heads, module.num_kv_heads)
                ]
                rows = [rows.to(module.dtype) for rows in made]
                return cls(module, group.get_metadata_builder(), *rows)
        raise AssertionError("no padded layer")

    def store(self, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        """Store tokens as the engine does, with the codes that are set."""
        cache = self.module.kv_cache
        self.module.impl.do_kv_cache_update(
            self.module, self.key[tokens], self.value[tokens], cache, slots
        )

    def attend(self, tokens: torch.Tensor, seq_len: int, first_block: int) -> torch.Tensor:
        """Let the last tokens of a sequence ask, ``[T, H, h]``."""
        import torch
        from vllm.v1.attention.backend import CommonAttentionMetadata

        count = len(tokens)
        starts = torch.tensor([0, count], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([seq_len], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=count,
            max_query_len=count,
            max_seq_len=seq_len,
            block_table_tensor=torch.arange(first_block, first_block + BLOCKS, dtype=torch.int32)[
                None
            ],
            slot_mapping=torch.full((count,), -1),
        )
        metadata = self.builder.build(0, common)
        query = self.query[tokens]
        return self.module.impl.forward(
            self.module,
            query,
            self.key[tokens],
            self.value[tokens],
            self.module.kv_cache,
            metadata,
            output=torch.empty_like(query),
        )

    def dense(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return float64 attention of ``tokens`` under a mask bool ``[tokens, T]``."""
        groups = self.query.shape[1] // self.key.shape[1]
        key, value = (rows.double().repeat_interleave(groups, 1) for rows in (self.key, self.value))
        logits = (self.query[tokens].double().transpose(0, 1) @ key.permute(1, 2, 0)) * (
            self.module.impl.scale
        )
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        return (weights @ value.transpose(0, 1)).transpose(0, 1)


def measure(options: dict[str, Any]) -> dict[str, float]:
    """Return errors of a tree in a row, of a plain sequence, and of one with a stored path."""
    import torch

    from tests.unit.tree_models import grow, is_ancestor, random_model
    from vllm_vispec.engine.trees.attention import padding_of
    from vllm_vispec.tree.settings import TreeSettings

    with engine.engine(engine.EngineOptions(**options)) as llm, torch.inference_mode():
        runner = draft_logits.model_runner(llm)
        tree = grow(random_model(9), TreeSettings(), 1, NODES)
        total = PREFIX + 1 + NODES
        layer = Layer.of(runner, total + 1)
        padding = padding_of(layer.module)
        assert padding is not None
        block = runner.cache_config.block_size
        first, plain = block, block * (1 + BLOCKS)
        tokens = torch.arange(total + 1)
        nodes = torch.arange(PREFIX, total)
        layer.store(tokens[:PREFIX], first + tokens[:PREFIX])
        padding.codes.set(torch.arange(1, NODES + 1), tree.path[0], NODES + 1)
        layer.store(nodes, first + nodes)
        found = layer.attend(nodes, total, 1)
        padding.codes.clear()
        parents = [0, *tree.parent[0].tolist()]
        visible = torch.ones(NODES + 1, total + 1, dtype=torch.bool).tril(PREFIX)
        for node in range(NODES + 1):
            for other in range(1, node):
                visible[node, PREFIX + other] = is_ancestor(parents, other, node)
        # The same tokens as a plain sequence, in other blocks.
        layer.store(tokens[:total], plain + tokens[:total])
        causal = torch.ones(NODES + 1, total + 1, dtype=torch.bool).tril(PREFIX)
        as_text = layer.attend(nodes, total, 1 + BLOCKS)
        # The deepest path, stored again in consecutive slots, and the token that follows it.
        path = [int(tree.depth[0].argmax()) + 1]
        while parents[path[0]]:
            path.insert(0, parents[path[0]])
        source = PREFIX + torch.tensor(path)
        places = torch.arange(PREFIX + 1, PREFIX + 1 + len(path))
        rows = layer.key[source], layer.value[source]
        layer.module.impl.store_plain(layer.module, *rows, first + places)
        sequence = torch.cat([tokens[: PREFIX + 1], source, tokens[total:]])
        behind = first + len(sequence) - 1
        layer.store(tokens[total:], torch.tensor([behind]))
        layer.store(sequence, plain + torch.arange(len(sequence)))
        after = layer.attend(tokens[total:], len(sequence), 1)
        expected = layer.attend(tokens[total:], len(sequence), 1 + BLOCKS)
        return {
            "tree": float((found - layer.dense(nodes, visible)).abs().max()),
            "plain": float((as_text - layer.dense(nodes, causal)).abs().max()),
            "stored_again": float((after - expected).abs().max()),
            "path": len(path),
        }
