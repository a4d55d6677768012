"""Which backends and sizes vLLM gives padded heads on CUDA; run in a process with stand-ins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support import cuda_stand_in
from tests.support.heads import BASE

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
CACHE_DTYPES = ("auto", "fp8")
HEAD_SIZES = (64, 80, 96, 128)
HEADS = 4
# Capability, cache dtype and backend of layers that are built, and what reads the head size.
BUILT = (
    ((9, 0), "auto", None),
    ((9, 0), "fp8", None),
    ((8, 0), "auto", "TRITON_ATTN"),
    ((8, 9), "fp8", "TRITON_ATTN"),
    ((12, 0), "auto", "TRITON_ATTN"),
    ((8, 0), "fp8", None),
    ((10, 0), "auto", None),
    ((8, 0), "auto", "FLEX_ATTENTION"),
)


def everything() -> Iterator[dict[str, Any]]:
    """Yield, in one process, what the functions below say."""
    engine = Engine(128)
    yield from ({"heads": row} for row in chosen_heads(engine))
    yield from ({"refusal": line} for line in refusals(engine))
    yield from ({"layer": layer} for layer in built_layers(engine))
    yield {"flex": _uses_of_head_size_in_flex()}
    yield from ({"question": question} for question in questions(engine))
    yield from ({"start": line} for line in starts(engine))


def chosen_heads(engine: Engine) -> Iterator[list[str]]:
    """Yield backend and head size of draft layers (chain) and of the target's layers (tree)."""
    from vllm_vispec.models.padded_heads import BackendFinder, padded_draft_head
    from vllm_vispec.trees import attention as trees
    from vllm_vispec.trees.settings import TreeSettings
    from vllm_vispec.utils.errors import ViSpecError

    channels = TreeSettings().num_channels

    def tree(finder: Any, size: int) -> Any:
        head = trees.padded_head(finder, size, channels)
        trees._check_backend(
            SimpleNamespace(attn_backend=head.backend, kv_cache_dtype=finder.kv_cache_dtype)
        )
        return head

    for kind, choose in (("chain", padded_draft_head), ("tree", tree)):
        for cache_dtype in CACHE_DTYPES:
            for capability in CAPABILITIES:
                cells = []
                for size in HEAD_SIZES:
                    with engine.on(capability, cache_dtype) as config:
                        finder = BackendFinder.of_layer(
                            HEADS, size, size**-0.5, cache_config=config.cache_config
                        )
                        try:
                            head = choose(finder, size)
                            cells.append(f"{head.backend.get_name()} {head.size}")
                        except ViSpecError:
                            cells.append("refused")
                where = f"{capability[0]}.{capability[1]}"
                yield [kind, cache_dtype, where, *cells]


def refusals(engine: Engine) -> Iterator[str]:
    """Yield what is said where a stated backend cannot serve the draft."""
    from vllm_vispec.models.padded_heads import BackendFinder, padded_draft_head
    from vllm_vispec.utils.errors import ViSpecError

    cases = (
        ((8, 0), "auto", "FLASH_ATTN", 256),
        ((8, 0), "fp8", "TRITON_ATTN", 128),
        ((8, 9), "fp8", "FLASH_ATTN", 128),
        ((8, 0), "int8_per_token_head", "FLASH_ATTN", 128),
        ((8, 0), "fp8", "TRITON_ATTN", 512),
    )
    for capability, cache_dtype, backend, size in cases:
        with engine.on(capability, cache_dtype, backend) as config:
            finder = BackendFinder.of_layer(1, size, 1.0, cache_config=config.cache_config)
            try:
                yield f"served: {padded_draft_head(finder, size)}"
            except ViSpecError as error:
                yield str(error)


def built_layers(engine: Engine) -> Iterator[dict[str, Any]]:
    """Yield what drafts' layers and their metadata builders hold, once they are really built."""
    import torch

    for capability, cache_dtype, backend in BUILT:
        with engine.on(capability, cache_dtype, backend) as config:
            layer = engine.draft_layer(config)
            spec = layer.attn.get_kv_cache_spec(config)
            build = layer.attn.attn_backend.get_builder_cls()
            builder = build(spec, [layer.attn.layer_name], config, torch.device("meta"))
            scratch = getattr(builder, "softmax_segm_output", None)
            yield {
                "backend": layer.attn.attn_backend.get_name(),
                "padded_size": layer.padded_size,
                "impl": layer.attn.impl.head_size,
                "spec": [spec.head_size, spec.head_size_v],
                "builder": getattr(builder, "head_dim", getattr(builder, "headdim", None)),
                "scratch": None if scratch is None else list(scratch.shape),
                "shares": _shares_workspaces(builder),
            }


def questions(engine: Engine) -> Iterator[list[Any]]:
    """Yield what kinds of layers ask the selector for, beyond what is usual, and their backend."""
    import torch

    from vllm_vispec.models.padded_heads import BackendFinder, choose_padded_head

    plain: dict[str, Any] | None = None
    model = vars(engine.config.model_config)
    model["is_mm_prefix_lm"] = False
    layers: tuple[dict[str, Any], ...] = (
        {},
        {"per_layer_sliding_window": 64},
        {"sinks": torch.zeros(HEADS)},
        {"quant_config": SimpleNamespace(kv_cache_scheme={"strategy": "tensor"})},
        {"quant_config": SimpleNamespace(kv_cache_scheme={"strategy": "attn_head"})},
    )
    # The last one is a layer of a model whose images see themselves as a whole.
    for settings in (*layers, {}):
        with engine.on((9, 0), "auto") as config:
            if plain is not None and not settings:
                model["is_mm_prefix_lm"] = True
            finder = BackendFinder.of_layer(
                HEADS,
                128,
                128**-0.5,
                cache_config=config.cache_config,
                prefix="layers.0",
                **settings,
            )
            plain = plain or finder.options
            changed = {k: v for k, v in finder.options.items() if v != plain[k]}
            head = choose_padded_head(finder, 128, 131)
            found = None if head is None else f"{head.backend.get_name()} {head.size}"
            yield [finder.kv_cache_dtype, changed, found]
    model["is_mm_prefix_lm"] = False


def starts(engine: Engine) -> Iterator[str]:
    """Yield what is said while the configuration is built, for the target's and draft's backend."""
    from vllm_vispec.models.head_size_checks import check_padded_heads
    from vllm_vispec.utils.errors import ViSpecError

    cases = (
        ((8, 9), "fp8", None, None),
        ((8, 9), "fp8", "FLASHINFER", None),
        ((8, 9), "fp8", "FLASHINFER", "FLASH_ATTN"),
        ((8, 0), "fp8", None, "TRITON_ATTN"),
        ((9, 0), "auto", "FLASH_ATTN", None),
    )
    for capability, cache_dtype, backend, draft_backend in cases:
        with engine.on(capability, cache_dtype, backend) as config:
            config.speculative_config = engine.speculative_config(draft_backend)
            try:
                check_padded_heads(config)
                yield "no objection"
            except ViSpecError as error:
                yield str(error)
            finally:
                config.speculative_config = None


def _uses_of_head_size_in_flex() -> int:
    """How often FlexAttention's builder names the target's head size that it keeps."""
    from inspect import getsource

    from vllm.v1.attention.backends import flex_attention

    return getsource(flex_attention).count(".headdim")


def _shares_workspaces(builder: Any) -> list[bool] | None:
    """Whether FlashInfer's layer takes a workspace made for 128 channels, and one for its own."""
    import torch

    if not hasattr(builder, "set_workspace_buffer"):
        return None
    heads = builder.max_num_batched_tokens * builder.num_qo_heads
    taken = []
    for head_size in (128, builder.head_dim):
        workspace = torch.empty(heads * head_size * 16, dtype=torch.uint8, device="meta")
        builder._workspace_buffer = None
        builder.set_workspace_buffer(workspace)
        taken.append(builder._workspace_buffer is workspace)
    return taken


class Engine:
    """A configuration whose model has heads of one size, and the platform under it."""

    def __init__(self, head_size: int) -> None:
        self.platform = cuda_stand_in.install()
        import torch
        import vllm.utils.flashinfer as flashinfer
        from transformers import LlamaConfig
        from vllm.config import CacheConfig, ModelConfig, VllmConfig
        from vllm.v1.attention.backends import flashinfer as flashinfer_backend

        flashinfer.has_nvidia_artifactory = lambda: True
        # 0.33 allocates it on the device; nothing here runs on one.
        flashinfer_backend._get_multi_ctas_kv_counter_buffer = lambda *args, **kwargs: None
        torch.set_default_dtype(torch.bfloat16)
        self.hf_config = LlamaConfig(
            hidden_size=HEADS * head_size,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            num_hidden_layers=2,
            intermediate_size=64,
            vocab_size=64,
            head_dim=head_size,
            architectures=["LlamaForCausalLM"],
        )
        with tempfile.TemporaryDirectory() as folder:
            self.hf_config.save_pretrained(Path(folder))
            model = ModelConfig(
                model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512
            )
        self.config = VllmConfig(model_config=model, cache_config=CacheConfig())
        from vllm_vispec.models.patch_points import apply_scratch

        apply_scratch()

    @contextmanager
    def on(
        self, capability: tuple[int, int], cache_dtype: str, backend: str | None = None
    ) -> Iterator[Any]:
        """Yield the configuration as on a device of this capability, with these settings."""
        import vllm.utils.flashinfer as flashinfer
        from vllm.config import set_current_vllm_config
        from vllm.platforms.interface import DeviceCapability
        from vllm.v1.attention import selector
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        self.platform.capability = DeviceCapability(*capability)
        for module in (selector, flashinfer):
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()
        self.config.cache_config.cache_dtype = cache_dtype
        self.config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
        self.config.compilation_config.static_forward_context.clear()
        with set_current_vllm_config(self.config):
            yield self.config

    def speculative_config(self, backend: str | None) -> Any:
        """Return what a head for this model makes of the setting, as far as it is read here."""
        from transformers import LlamaConfig
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        head = replace(BASE, hidden_size=HEADS * 128, head_dim=128, num_attention_heads=HEADS)
        config = LlamaConfig(**head.to_llama_config_dict())
        return SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=config),
            attention_backend=AttentionBackendEnum[backend] if backend else None,
            kv_cache_dtype=None,
            num_speculative_tokens_per_batch_size=None,
            enable_adaptive_verification=False,
        )

    def draft_layer(self, config: Any) -> Any:
        """Return a draft's attention layer without memory, as on one device."""
        import torch
        from vllm.model_executor import parameter
        from vllm.model_executor.layers import linear

        from vllm_vispec.models import attention
        from vllm_vispec.spec_decode.row_table import RowTable
        from vllm_vispec.spec_decode.step import RowIds

        modules: tuple[Any, ...] = (attention, linear, parameter)
        for module in modules:
            module.get_tensor_model_parallel_world_size = lambda: 1
            module.get_tensor_model_parallel_rank = lambda: 0
        size = self.hf_config.hidden_size
        with torch.device("meta"):
            rows = RowTable(RowIds(num_slots=1, num_query_tokens=1), size, 16)
            return attention.MaskedAttention(
                self.hf_config,
                size,
                HEADS,
                HEADS,
                rows=rows,
                cache_config=config.cache_config,
                prefix="model.layers.2.self_attn",
            )
