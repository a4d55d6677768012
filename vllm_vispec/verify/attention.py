"""Attention backends of this device on the padded heads of drafts and trees, against fp32 softmax.

Each check builds one attention layer of vLLM's for one backend, with vLLM's own metadata builder
and KV cache, stores a batch of prompts and asks with the rows of a decode step. What a padded head
adds, masked positions in the draft and path codes in the target, is put into the channels by hand.

Shapes: R requests, S prompt tokens of one, J rows it decodes, T tokens of a batch, H heads, K KV
heads, h head size, P padded head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheTensor, create_kv_cache_views
from vllm.v1.worker.utils import AttentionGroup

from vllm_vispec.engine.row_table import MASK_CHANNEL
from vllm_vispec.tree.codes import encode, num_channels, word_tables
from vllm_vispec.tree.grow import DraftTree, TreeGrower
from vllm_vispec.tree.settings import TreeSettings
from vllm_vispec.verify.result import AttentionCase, AttentionError

# Twenty requests, so that kernels which split a KV sequence fill their scratch; prompts on both
# sides of a block's border.
PROMPTS = tuple(range(33, 253, 11))
VOCABULARY = 64
HEAD_SIZE_STEP, MOST_CHANNELS = 8, 256


@dataclass
class Rows:
    """Queries, keys and values of all tokens ``[T, heads, h]``, and who sees whom.

    Attributes:
        visible: for each request, bool ``[S + J, S + J]``.
        query_channels, key_channels: what stands behind ``h``, ``[T, channels]``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: list[torch.Tensor]
    query_channels: torch.Tensor
    key_channels: torch.Tensor


def check_attention(vllm_config: VllmConfig, case: AttentionCase, backend: str) -> AttentionError:
    """Run one backend at one padded head size; what it refuses is its reason."""
    device = torch.device(current_platform.device_type)
    dtype = vllm_config.model_config.dtype
    found = _find_head_size(vllm_config, AttentionBackendEnum[backend], case, dtype)
    if isinstance(found, str):
        return AttentionError(case, backend, reason=found)
    backend_class, head_size = found
    rows = _rows(case, head_size, dtype)
    layer = PagedLayer.build(vllm_config, backend_class, case, head_size, dtype, device)
    try:
        prompt, decode = layer.run(rows, len(PROMPTS), case.decode_rows)
    finally:
        vllm_config.compilation_config.static_forward_context.pop(layer.name)
    expected = [
        _softmax(rows, request, start, length, case.head_size**-0.5)
        for request, (start, length) in enumerate(_spans(case.decode_rows))
    ]
    asked = case.decode_rows
    return AttentionError(
        case,
        backend,
        head_size,
        prompt=_error(prompt, torch.cat([one[:-asked] for one in expected])),
        decode=_error(decode, torch.cat([one[-asked:] for one in expected])),
    )


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference; NaN is infinitely wrong."""
    worst = float((found.float().cpu() - expected).abs().max())
    return worst if worst == worst else float("inf")


def _find_head_size(
    vllm_config: VllmConfig, backend: AttentionBackendEnum, case: AttentionCase, dtype: torch.dtype
) -> tuple[type[AttentionBackend], int] | str:
    """Return the class and the engine's head size, or the next that it takes; else the reason."""
    try:
        backend_class = backend.get_class()
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    reasons: list[str] = []
    most = case.head_size + MOST_CHANNELS
    for head_size in range(case.padded_size, most + 1, HEAD_SIZE_STEP):
        selected = AttentionSelectorConfig(
            head_size,
            dtype,
            vllm_config.cache_config.cache_dtype,
            None,
            attn_type=AttentionType.DECODER,
        )
        capability: Any = current_platform.get_device_capability()
        if capability is None:
            # vLLM's CPU platform asks no backend; its one backend answers these two.
            fits = backend_class.supports_head_size(head_size)
            fits = fits and backend_class.supports_dtype(dtype)
            found = [] if fits else ["head size or dtype not supported"]
        else:
            found = backend_class.validate_configuration(
                device_capability=capability, **selected._asdict()
            )
        if not found:
            return backend_class, head_size
        reasons = reasons or found
    return ", ".join(reasons)


def _rows(case: AttentionCase, padded_size: int, dtype: torch.dtype) -> Rows:
    """Make up a batch; values are those of the layer's dtype."""
    generator = torch.Generator().manual_seed(0)
    total = sum(length for _, length in _spans(case.decode_rows))
    query, key, value = (
        torch.randn(total, heads, case.head_size, generator=generator).to(dtype)
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    )
    spare = padded_size - case.head_size
    make = _tree_rows if case.tree is not None else _masked_rows
    visible, query_channels, key_channels = make(case, total, spare, generator)
    return Rows(query, key, value, visible, query_channels.to(dtype), key_channels.to(dtype))


def _masked_rows(
    case: AttentionCase, total: int, spare: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hide two thirds of each prompt behind its first token, as an image's tokens are."""
    hidden_T = torch.rand(total, generator=generator) < 2 / 3
    visible = []
    for start, length in _spans(case.decode_rows):
        hidden_T[start] = False
        hidden_T[start + length - case.decode_rows : start + length] = False
        seen = ~hidden_T[start : start + length]
        visible.append(torch.ones(length, length, dtype=torch.bool).tril() & seen)
    query_channels = torch.full((total, spare), MASK_CHANNEL)
    key_channels = torch.zeros(total, spare)
    key_channels[hidden_T] = -MASK_CHANNEL
    return visible, query_channels, key_channels


def _tree_rows(
    case: AttentionCase, total: int, spare: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Let each request verify a tree grown from made-up logits."""
    assert case.tree is not None
    settings = TreeSettings.from_config(case.tree)
    tree = _grow(settings, case.decode_rows - 1, generator)
    tables = word_tables(settings.top_k, torch.float32, torch.device("cpu"))
    used = num_channels(settings.levels, settings.top_k)
    channels = torch.zeros(2, total, spare)
    visible = []
    for request, (start, length) in enumerate(_spans(case.decode_rows)):
        root = length - case.decode_rows
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[root:, root + 1 :] = False
        parents = [0, *tree.parent[request].tolist()]
        for node in range(1, case.decode_rows):
            above = node
            while above:
                seen[root + node, root + above] = True
                above = parents[above]
        visible.append(seen)
        for table, written in zip(tables, channels, strict=True):
            codes = encode(tree.path[request], table)
            written[start + root + 1 : start + length, :used] = codes
    return visible, channels[0], channels[1]


def _grow(settings: TreeSettings, num_nodes: int, generator: torch.Generator) -> DraftTree:
    grower, requests = TreeGrower(settings), len(PROMPTS)
    frontier = grower.start(3 * torch.randn(requests, VOCABULARY, generator=generator))
    for _ in range(settings.depth):
        shape = (*frontier.token.shape, VOCABULARY)
        frontier = grower.expand(3 * torch.randn(*shape, generator=generator))
    return grower.finish(num_nodes)


def _spans(decode_rows: int) -> list[tuple[int, int]]:
    """Return each request's first token and number of tokens, decoded rows included."""
    lengths = [prompt + decode_rows for prompt in PROMPTS]
    return list(zip(accumulate([0, *lengths[:-1]]), lengths, strict=True))


def _softmax(rows: Rows, request: int, start: int, length: int, scale: float) -> torch.Tensor:
    """Return fp32 attention of one request's rows ``[S + J, H, h]`` under its mask."""
    query, key, value = (
        part[start : start + length].float() for part in (rows.query, rows.key, rows.value)
    )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = logits.masked_fill(~rows.visible[request], float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@dataclass
class PagedLayer:
    """One attention layer with a KV cache of its own.

    Attributes:
        layer: vLLM's `Attention`.
        group: makes its metadata.
        slots: KV slots of each request, ``[S + J]``.
        block_table: ``[R, blocks]``.
    """

    name: str
    layer: Any
    group: AttentionGroup
    vllm_config: VllmConfig
    slots: list[torch.Tensor]
    block_table: torch.Tensor

    @classmethod
    def build(
        cls,
        vllm_config: VllmConfig,
        backend: type[AttentionBackend],
        case: AttentionCase,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PagedLayer:
        """Build the layer as an engine does, and a cache that holds all prompts."""
        cache_config = vllm_config.cache_config
        cache_config.block_size = block_size = backend.get_preferred_block_size(32)
        layout = get_supported_kv_cache_layouts([backend])[0]
        cache_config.kv_cache_layout = layout.name
        name = "model.layers.0.verify.attn"
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with set_current_vllm_config(vllm_config), device:
                layer = Attention(
                    case.num_heads,
                    head_size,
                    case.head_size**-0.5,
                    case.num_kv_heads,
                    cache_config=cache_config,
                    prefix=name,
                    attn_backend=backend,
                )
                layer.process_weights_after_loading(dtype)
                spec: Any = layer.get_kv_cache_spec(vllm_config)
                group = AttentionGroup(backend, [name], spec, 0)
                group.create_metadata_builders(vllm_config, device)
        finally:
            torch.set_default_dtype(before)
        # Blocks of 0 stay empty, as in an engine.
        counts = [-(-length // block_size) for _, length in _spans(case.decode_rows)]
        firsts = accumulate([1, *counts[:-1]])
        blocks = [torch.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]
        num_blocks, page = 1 + sum(counts), spec.page_size_bytes
        raw = torch.zeros(num_blocks * page, dtype=torch.int8, device=device)
        tensor = KVCacheTensor(
            size=len(raw), layers=[name], layer_stride=len(raw), block_stride=page
        )
        layer.bind_kv_cache(create_kv_cache_views(raw, spec, num_blocks, layout, tensor)[0])
        places = torch.arange(block_size)
        slots = [
            (one.unsqueeze(1) * block_size + places).flatten()[:length]
            for one, (_, length) in zip(blocks, _spans(case.decode_rows), strict=True)
        ]
        table = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True).int().to(device)
        return cls(name, layer, group, vllm_config, slots, table)

    def run(self, rows: Rows, num_requests: int, decode_rows: int) -> tuple[torch.Tensor, ...]:
        """Store and ask all prompts, then the rows of a decode step; ``[T, H, h]`` of both."""
        spans = _spans(decode_rows)
        prompts = [torch.arange(start, start + n - decode_rows) for start, n in spans]
        steps = [torch.arange(start + n - decode_rows, start + n) for start, n in spans]
        lengths = [n for _, n in spans]
        before = [n - decode_rows for n in lengths]
        return (
            self._pass(rows, prompts, [0] * num_requests, before),
            self._pass(rows, steps, before, lengths),
        )

    def _pass(
        self,
        rows: Rows,
        tokens: list[torch.Tensor],
        computed: list[int],
        lengths: list[int],
    ) -> torch.Tensor:
        device = self.block_table.device
        counts = [len(one) for one in tokens]
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        slot_T = torch.cat(
            [one[a:b] for one, a, b in zip(self.slots, computed, lengths, strict=True)]
        ).to(device)
        seq_len_R = torch.tensor(lengths, dtype=torch.int32)
        metadata = self.group.build_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=seq_len_R.to(device),
                num_reqs=len(tokens),
                num_actual_tokens=int(starts[-1]),
                max_query_len=max(counts),
                max_seq_len=max(lengths),
                block_table_tensor=self.block_table,
                slot_mapping=slot_T,
                seq_lens_cpu_upper_bound=seq_len_R,
            )
        )
        index_T = torch.cat(tokens)
        no_channels = rows.key_channels.new_zeros(len(index_T), rows.key_channels.shape[1])
        parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {
            "query": (rows.query, rows.query_channels[index_T]),
            "key": (rows.key, rows.key_channels[index_T]),
            "value": (rows.value, no_channels),
        }
        q, k, v = (
            torch.cat([own[index_T], channels[:, None].expand(-1, own.shape[1], -1)], -1)
            .to(device)
            .flatten(1)
            for own, channels in parts.values()
        )
        with (
            torch.inference_mode(),
            set_current_vllm_config(self.vllm_config),
            set_forward_context(
                {self.name: metadata},
                self.vllm_config,
                num_tokens=len(index_T),
                slot_mapping={self.name: slot_T},
            ),
        ):
            found = self.layer(q, k, v)
        return found.view(len(index_T), self.layer.num_heads, -1)[..., : rows.query.shape[-1]]
