"""Attention backends of this device on the padded heads of drafts and trees, against fp32 softmax.

A layer of vLLM's for one backend, with vLLM's metadata and KV cache, stores a batch of prompts and
asks with the rows of a decode step. What a padded head adds is put into its channels by hand:
masked positions for the draft, node codes for the target.

Shapes: R requests, S prompt tokens of one, J rows it decodes, N = S + J, T tokens of a pass, H
heads of queries or of keys, h head size, P padded head size, c channels behind ``h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
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
from vllm_vispec.trees.codes import encode, word_tables
from vllm_vispec.trees.grow import DraftTree, TreeGrower
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
        size, reason = None, f"{type(error).__name__}: {error}"
    if size is None:
        return AttentionError(case=case, backend=backend, reason=reason)
    requests = make_requests(case, size, vllm_config.model_config.dtype)
    layer = PagedLayer.build(vllm_config, backend_class, case, size, device)
    prompt = layer.run(requests, [0] * len(PROMPTS), PROMPTS)
    decode = layer.run(requests, PROMPTS, [prompt + case.decode_rows for prompt in PROMPTS])
    dtype = _cache_dtype(vllm_config)
    expected = [one.softmax(case.head_size, dtype) for one in requests]
    return AttentionError(
        case=case,
        backend=backend,
        used_size=size,
        prompt=_error(prompt, [out[: -case.decode_rows] for out in expected]),
        decode=_error(decode, [out[-case.decode_rows :] for out in expected]),
    )


def _error(found_THP: torch.Tensor, expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference; what is no number is as wrong as can be written down."""
    expected_THh = torch.cat(list(expected))
    found_THh = found_THP[..., : expected_THh.shape[-1]].float().cpu()
    worst = (found_THh - expected_THh).abs().max()
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


class Request(NamedTuple):
    """Made-up tokens of one request, and who sees whom.

    Attributes:
        query, key, value: ``[N, H, P]``.
        visible: bool ``[N, N]``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor

    def softmax(self, head_size: int, cache_dtype: torch.dtype | None) -> torch.Tensor:
        """Return fp32 attention ``[N, H, h]`` under the mask.

        Args:
            cache_dtype: through which keys and values pass; None: as they are.
        """
        cached = (one.to(cache_dtype or one.dtype) for one in (self.key, self.value))
        groups = self.query.shape[1] // self.key.shape[1]
        query = self.query[..., :head_size].float()
        key, value = (one[..., :head_size].float().repeat_interleave(groups, 1) for one in cached)
        logits = torch.einsum("qhd,khd->hqk", query, key) * head_size**-0.5
        weights = logits.masked_fill(~self.visible, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)


def make_requests(case: AttentionCase, padded_size: int, dtype: torch.dtype) -> list[Request]:
    """Draw random heads and write what the feature has behind them."""
    generator, requests = torch.Generator().manual_seed(0), []
    trees = _grow_trees(case, generator) if case.feature == TREE else None
    for number, prompt in enumerate(PROMPTS):
        length = prompt + case.decode_rows
        visible_NN = torch.ones(length, length, dtype=torch.bool).tril()
        query_Nc, key_Nc, value_Nc = torch.zeros(3, length, padded_size - case.head_size)
        if trees is None:
            # Two thirds of the prompt behind its first token, as if they were an image's.
            hidden_N = torch.rand(length, generator=generator) < 2 / 3
            hidden_N[0], hidden_N[prompt:] = False, False
            query_Nc.fill_(MASK_CHANNEL)
            key_Nc[hidden_N] = -MASK_CHANNEL
            visible_NN &= ~hidden_N
        else:
            path_JL, parents = trees.path[number], trees.parent[number].tolist()
            tables = word_tables(case.tree.top_k, torch.float32, torch.device("cpu"))
            for table, channels_Nc in zip(tables, (query_Nc, key_Nc), strict=True):
                channels_Nc[prompt + 1 :, : case.tree.num_channels] = encode(path_JL, table)
            visible_JJ = visible_NN[prompt:, prompt:]
            visible_JJ[:, 1:] = False
            for node, parent in enumerate(parents, start=1):
                visible_JJ[node, 1:] = visible_JJ[parent, 1:]
                visible_JJ[node, node] = True
        query = _heads(case.num_heads, case.head_size, query_Nc, generator)
        key = _heads(case.num_kv_heads, case.head_size, key_Nc, generator)
        value = _heads(case.num_kv_heads, case.head_size, value_Nc, generator)
        requests.append(Request(query.to(dtype), key.to(dtype), value.to(dtype), visible_NN))
    return requests


def _heads(
    num_heads: int, head_size: int, channels_Nc: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return random heads ``[N, H, P]`` with the channels behind each."""
    own_NHh = torch.randn(len(channels_Nc), num_heads, head_size, generator=generator)
    return torch.cat((own_NHh, channels_Nc.unsqueeze(1).expand(-1, num_heads, -1)), -1)


def _grow_trees(case: AttentionCase, generator: torch.Generator) -> DraftTree:
    """Return a tree for each request, grown from made-up logits."""
    grower = TreeGrower(case.tree)
    frontier = grower.start_trees(3 * torch.randn(len(PROMPTS), VOCABULARY, generator=generator))
    for _ in range(case.tree.depth):
        shape = (*frontier.token.shape, VOCABULARY)
        frontier = grower.grow_level(3 * torch.randn(shape, generator=generator))
    return grower.finish_trees(case.decode_rows - 1)


@dataclass
class PagedLayer:
    """One attention layer of vLLM's with a KV cache for the whole batch.

    Attributes:
        group: makes the metadata.
        blocks: int32 ``[R, ...]``, KV blocks of each request, one behind the other.
    """

    layer: Any
    group: AttentionGroup
    vllm_config: VllmConfig
    blocks: torch.Tensor
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
        most = -(-(PROMPTS[-1] + case.decode_rows) // block_size)
        # Block 0 is nobody's, as in an engine.
        blocks = torch.arange(1, 1 + len(PROMPTS) * most, dtype=torch.int32).view(-1, most)
        num_blocks, layout = 1 + blocks.numel(), get_supported_kv_cache_layouts([backend])[0]
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
        return cls(layer, group, vllm_config, blocks.to(device), block_size, device)

    def run(
        self, requests: Sequence[Request], begins: Sequence[int], ends: Sequence[int]
    ) -> torch.Tensor:
        """Store and ask with the tokens from begin to end of each request; ``[T, H, P]``."""
        spans = list(zip(begins, ends, strict=True))
        first_R = self.blocks[:, 0].tolist()
        slot_T = torch.cat(
            [
                first * self.block_size + torch.arange(*span)
                for first, span in zip(first_R, spans, strict=True)
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
                num_actual_tokens=len(slot_T),
                max_query_len=max(counts),
                max_seq_len=max(ends),
                block_table_tensor=self.blocks,
                slot_mapping=slot_T,
                seq_lens_cpu_upper_bound=seq_len_R,
            )
        )
        rows = [
            torch.cat([part[begin:end] for part, (begin, end) in zip(parts, spans, strict=True)])
            for parts in list(zip(*requests, strict=True))[:3]
        ]
        with (
            torch.inference_mode(),
            set_current_vllm_config(self.vllm_config),
            set_forward_context(
                {_LAYER: metadata},
                self.vllm_config,
                num_tokens=len(slot_T),
                slot_mapping={_LAYER: slot_T},
            ),
        ):
            found = self.layer(*(one.to(self.device).flatten(1) for one in rows))
        return found.view(len(slot_T), self.layer.num_heads, -1)
