"""Attention backends of this device on the padded heads of drafts and trees, against fp32 softmax.

A layer of vLLM's for one backend, with vLLM's metadata and KV cache, stores a batch of prompts and
asks with the rows of a decode step. What a padded head adds is put into its channels by hand:
masked positions for the draft, node codes for the target.

Shapes: R requests, S prompt tokens of one, J rows it decodes, N = S + J, T tokens in all, H heads
of queries or of keys, h head size, P padded head size, c channels behind ``h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheTensor, create_kv_cache_views
from vllm.v1.worker.utils import AttentionGroup

from vllm_vispec.models.padded_heads import MAX_EXTRA_CHANNELS, BackendFinder
from vllm_vispec.models.patch_points import apply_scratch, apply_workspace
from vllm_vispec.spec_decode.row_table import MASK_CHANNEL
from vllm_vispec.trees.codes import encode, num_channels, word_tables
from vllm_vispec.trees.grow import DraftTree, TreeGrower
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.verify.result import TREE, AttentionCase, AttentionError

# Twenty requests, so that kernels which split a sequence fill their scratch; prompts on both sides
# of blocks' borders, and no more tokens than vLLM's smallest default batch.
PROMPTS = tuple(range(33, 133, 5))
VOCABULARY, BLOCK_SIZE, WORST = 64, 32, 1e9
_LAYER = "model.layers.0.verify.attn"


def check_attention(vllm_config: VllmConfig, case: AttentionCase, backend: str) -> AttentionError:
    """Run one backend at one padded head size; if it refuses, its reason is returned."""
    device = torch.device(current_platform.device_type)
    try:
        backend_class = AttentionBackendEnum[backend].get_class()
        with set_current_vllm_config(vllm_config):
            size, reason = _find_head_size(vllm_config, backend_class, case)
    except (ImportError, OSError) as error:
        return AttentionError(case, backend, reason=f"{type(error).__name__}: {error}")
    if size is None:
        return AttentionError(case, backend, reason=reason)
    batch = Batch.make(case, size, vllm_config.model_config.dtype)
    layer = PagedLayer.build(vllm_config, backend_class, case, size, device)
    prompt = layer.run(batch, [0] * len(PROMPTS), list(PROMPTS))
    decode = layer.run(batch, list(PROMPTS), batch.lengths)
    expected = batch.softmax(case.head_size, _cache_dtype(vllm_config))
    own = slice(case.head_size)
    return AttentionError(
        case,
        backend,
        size,
        _error(prompt[..., own], [out[: -case.decode_rows] for out in expected]),
        _error(decode[..., own], [out[-case.decode_rows :] for out in expected]),
    )


def _error(found_THh: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """Return the largest difference; what is no number is as wrong as can be written down."""
    worst = (found_THh.float().cpu() - torch.cat(expected)).abs().max()
    return float(worst.nan_to_num(nan=WORST, posinf=WORST))


def _find_head_size(
    vllm_config: VllmConfig, backend: Any, case: AttentionCase
) -> tuple[int | None, str]:
    """Return the engine's head size or the next that the backend serves; else why none."""
    dtype, cache_dtype = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
    finder = BackendFinder(dtype, cache_dtype, {}, given=backend)
    # A CPU has none; vLLM's platform asks its one backend nothing.
    capability = current_platform.get_device_capability()
    reasons: list[str] = []
    first = -(-case.padded_size // finder.step) * finder.step
    for size in range(first, case.head_size + MAX_EXTRA_CHANNELS + 1, finder.step):
        asked = AttentionSelectorConfig(
            size, dtype, cache_dtype, None, attn_type=AttentionType.DECODER
        )
        found: list[str] = (
            backend.validate_configuration(device_capability=capability, **asked._asdict())
            if capability is not None
            else []
        )
        if not found and finder.find(size) is not None:
            return size, ""
        reasons = reasons or found
    return None, ", ".join(reasons) or "serves no such head size, dtype or cache"


def _cache_dtype(vllm_config: VllmConfig) -> torch.dtype | None:
    name = vllm_config.cache_config.cache_dtype
    eights = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
    return {**eights, "fp8_e5m2": torch.float8_e5m2}.get(name)


@dataclass
class Batch:
    """Made-up tokens ``[T, H, P]`` of all requests, in a row, and who sees whom.

    Attributes:
        lengths: ``S + J`` of each request.
        visible: bool ``[S + J, S + J]`` of each request.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lengths: list[int]
    visible: list[torch.Tensor]

    @classmethod
    def make(cls, case: AttentionCase, padded_size: int, dtype: torch.dtype) -> Batch:
        """Draw random heads and write what the feature has behind them."""
        generator = torch.Generator().manual_seed(0)
        lengths = [prompt + case.decode_rows for prompt in PROMPTS]
        write = _write_codes if case.feature == TREE else _write_mask
        channels_2Tc = torch.zeros(2, sum(lengths), padded_size - case.head_size)
        parts_Nc = [list(part.split(lengths)) for part in channels_2Tc]
        visible = write(case, parts_Nc[0], parts_Nc[1], generator)
        behind = *channels_2Tc, torch.zeros_like(channels_2Tc[0])
        query, key, value = (
            torch.cat(
                (
                    torch.randn(len(one), heads, case.head_size, generator=generator),
                    one.unsqueeze(1).expand(-1, heads, -1),
                ),
                -1,
            ).to(dtype)
            for one, heads in zip(behind, (case.num_heads, *2 * [case.num_kv_heads]), strict=True)
        )
        return cls(query, key, value, lengths, visible)

    def softmax(self, head_size: int, cache_dtype: torch.dtype | None) -> list[torch.Tensor]:
        """Return fp32 attention ``[S + J, H, h]`` of each request under its mask.

        Args:
            cache_dtype: through which keys and values pass; None: as they are.
        """
        groups = self.query.shape[1] // self.key.shape[1]
        cached = (
            self.key.to(cache_dtype or self.key.dtype),
            self.value.to(cache_dtype or self.value.dtype),
        )
        rows = self.query.float(), *(one.float().repeat_interleave(groups, 1) for one in cached)
        split = (one[..., :head_size].split(self.lengths) for one in rows)
        found = []
        for query, key, value, visible in zip(*split, self.visible, strict=True):
            logits = torch.einsum("qhd,khd->hqk", query, key) * head_size**-0.5
            weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            found.append(torch.einsum("hqk,khd->qhd", weights, value))
        return found


Channels = list[torch.Tensor]


def _write_mask(
    case: AttentionCase, query: Channels, key: Channels, generator: torch.Generator
) -> list[torch.Tensor]:
    """Hide two thirds of each prompt behind its first token, as if they were an image's."""
    visible = []
    for query_Nc, key_Nc in zip(query, key, strict=True):
        hidden_N = torch.rand(len(key_Nc), generator=generator) < 2 / 3
        hidden_N[0], hidden_N[-case.decode_rows :] = False, False
        query_Nc.fill_(MASK_CHANNEL)
        key_Nc[hidden_N] = -MASK_CHANNEL
        visible.append(torch.ones(2 * hidden_N.shape, dtype=torch.bool).tril() & ~hidden_N)
    return visible


def _write_codes(
    case: AttentionCase, query: Channels, key: Channels, generator: torch.Generator
) -> list[torch.Tensor]:
    """Let each request verify a tree grown from made-up logits."""
    settings, visible = TreeSettings.from_config(case.tree), []
    tree = _grow(settings, case.decode_rows - 1, generator)
    tables = word_tables(settings.top_k, torch.float32, torch.device("cpu"))
    used = num_channels(settings.levels, settings.top_k)
    for request, channels in enumerate(zip(query, key, strict=True)):
        for table, channels_Nc in zip(tables, channels, strict=True):
            channels_Nc[1 - case.decode_rows :, :used] = encode(tree.path[request], table)
        length = len(query[request])
        seen_NN = torch.ones(length, length, dtype=torch.bool).tril()
        rows_JJ = seen_NN[-case.decode_rows :, -case.decode_rows :]
        rows_JJ[:, 1:] = False
        for node, parent in enumerate(tree.parent[request].tolist(), start=1):
            rows_JJ[node, 1:] = rows_JJ[parent, 1:]
            rows_JJ[node, node] = True
        visible.append(seen_NN)
    return visible


def _grow(settings: TreeSettings, num_nodes: int, generator: torch.Generator) -> DraftTree:
    grower = TreeGrower(settings)
    frontier = grower.start_trees(3 * torch.randn(len(PROMPTS), VOCABULARY, generator=generator))
    for _ in range(settings.depth):
        shape = (*frontier.token.shape, VOCABULARY)
        frontier = grower.grow_level(3 * torch.randn(shape, generator=generator))
    return grower.finish_trees(num_nodes)


@dataclass
class PagedLayer:
    """One attention layer of vLLM's with a KV cache for the whole batch.

    Attributes:
        group: makes the metadata.
        blocks: KV blocks of each request.
    """

    layer: Any
    group: AttentionGroup
    vllm_config: VllmConfig
    blocks: list[torch.Tensor]
    block_size: int
    device: torch.device

    @classmethod
    def build(
        cls,
        vllm_config: VllmConfig,
        backend: Any,
        case: AttentionCase,
        head_size: int,
        device: torch.device,
    ) -> PagedLayer:
        """Build layer and cache as an engine does."""
        apply_scratch()
        apply_workspace(backend)
        cache_config, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
        block_size = backend.get_preferred_block_size(BLOCK_SIZE)
        counts = [-(-(prompt + case.decode_rows) // block_size) for prompt in PROMPTS]
        # Block 0 is nobody's, as in an engine.
        blocks = list(torch.arange(1, 1 + sum(counts)).split(counts))
        num_blocks, layout = 1 + sum(counts), get_supported_kv_cache_layouts([backend])[0]
        cache_config.block_size, cache_config.kv_cache_layout = block_size, layout.name
        cache_config.num_gpu_blocks = num_blocks
        vllm_config.compilation_config.static_forward_context.pop(_LAYER, None)
        with set_default_torch_dtype(dtype), set_current_vllm_config(vllm_config), device:
            layer = Attention(
                case.num_heads,
                head_size,
                case.head_size**-0.5,
                case.num_kv_heads,
                cache_config=cache_config,
                prefix=_LAYER,
                attn_backend=backend,
            )
            layer.process_weights_after_loading(dtype)
            spec: Any = backend.customize_spec(layer.get_kv_cache_spec(vllm_config))
            group = AttentionGroup(backend, [_LAYER], spec, 0)
            group.create_metadata_builders(vllm_config, device)
        raw = torch.zeros(num_blocks * spec.page_size_bytes, dtype=torch.int8, device=device)
        tensor = KVCacheTensor(len(raw), [_LAYER], len(raw), spec.page_size_bytes)
        views = create_kv_cache_views(raw, spec, num_blocks, layout, tensor)
        layer.bind_kv_cache(views[0])
        return cls(layer, group, vllm_config, blocks, block_size, device)

    def run(self, batch: Batch, begins: list[int], ends: list[int]) -> torch.Tensor:
        """Store and ask with some tokens of each request; ``[T, H, P]``."""
        spans = list(zip(begins, ends, strict=True))
        places = [torch.arange(*span) for span in spans]
        firsts = accumulate([0, *batch.lengths[:-1]])
        token_T = torch.cat([first + place for first, place in zip(firsts, places, strict=True)])
        slot_T = torch.cat(
            [
                blocks[place // self.block_size] * self.block_size + place % self.block_size
                for blocks, place in zip(self.blocks, places, strict=True)
            ]
        ).to(self.device)
        counts = [end - begin for begin, end in spans]
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        seq_len_R = torch.tensor(ends, dtype=torch.int32)
        metadata = self.group.build_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts.to(self.device),
                query_start_loc_cpu=starts,
                seq_lens=seq_len_R.to(self.device),
                num_reqs=len(spans),
                num_actual_tokens=len(token_T),
                max_query_len=max(counts),
                max_seq_len=max(ends),
                block_table_tensor=pad_sequence(self.blocks, batch_first=True)
                .int()
                .to(self.device),
                slot_mapping=slot_T,
                seq_lens_cpu_upper_bound=seq_len_R,
            )
        )
        rows = (one[token_T].to(self.device) for one in (batch.query, batch.key, batch.value))
        with (
            torch.inference_mode(),
            set_current_vllm_config(self.vllm_config),
            set_forward_context(
                {_LAYER: metadata},
                self.vllm_config,
                num_tokens=len(token_T),
                slot_mapping={_LAYER: slot_T},
            ),
        ):
            found = self.layer(*(one.flatten(1) for one in rows))
        return found.view(len(token_T), self.layer.num_heads, -1)
