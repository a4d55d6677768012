"""Backend and head size of padded heads on NVIDIA GPUs, as vLLM's own Python code decides.

The process has stand-ins for what is compiled for CUDA; nothing runs on a device.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import cuda_stand_in
from tests.support.child import Child
from tests.support.heads import BASE
from tests.support.runners import overlay_folder

# What heads of 64, 80, 96 and 128 become: the draft's with a chain, the target's with a tree.
EXPECTED = """
chain auto 8.0  | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain auto 8.9  | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain auto 9.0  | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain auto 10.0 | FLASHINFER 128 | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASHINFER 256
chain auto 12.0 | FLASH_ATTN 72  | FLASH_ATTN 88  | FLASH_ATTN 104  | FLASH_ATTN 136
chain fp8 8.0   | FLASHINFER 128 | FLASHINFER 128 | FLASHINFER 128  | FLASHINFER 256
chain fp8 8.9   | FLASHINFER 128 | TRITON_ATTN 96 | TRITON_ATTN 112 | FLASHINFER 256
chain fp8 9.0   | FLASH_ATTN 80  | FLASH_ATTN 96  | FLASH_ATTN 112  | FLASH_ATTN 144
chain fp8 10.0  | FLASHINFER 128 | FLASH_ATTN 96  | FLASH_ATTN 112  | FLASHINFER 256
chain fp8 12.0  | FLASHINFER 128 | TRITON_ATTN 96 | TRITON_ATTN 112 | FLASHINFER 256
tree auto 8.0   | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree auto 8.9   | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree auto 9.0   | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree auto 10.0  | FLASHINFER 128 | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASHINFER 256
tree auto 12.0  | FLASH_ATTN 88  | FLASH_ATTN 104 | FLASH_ATTN 120  | FLASH_ATTN 152
tree fp8 8.0    | refused        | refused        | refused         | refused
tree fp8 8.9    | refused        | refused        | refused         | refused
tree fp8 9.0    | refused        | refused        | refused         | refused
tree fp8 10.0   | refused        | refused        | refused         | refused
tree fp8 12.0   | refused        | refused        | refused         | refused
"""
# Capability, cache dtype and backend of layers that are built; of each its backend, its head size
# and its builder's, split-K scratch, and whether FlashInfer's layer takes a workspace made for 128
# channels, and one made for its own.
BUILT = [
    (((9, 0), "auto", None), "FLASH_ATTN", 136, 136, None, None),
    (((9, 0), "fp8", None), "FLASH_ATTN", 144, 144, None, None),
    (((8, 0), "auto", "TRITON_ATTN"), "TRITON_ATTN", 136, 136, [64, 4, 16, 256], None),
    (((8, 9), "fp8", "TRITON_ATTN"), "TRITON_ATTN", 144, 144, [64, 4, 16, 256], None),
    (((12, 0), "auto", "TRITON_ATTN"), "TRITON_ATTN", 136, 136, [16, 4, 64, 256], None),
    (((8, 0), "fp8", None), "FLASHINFER", 256, 256, None, [False, True]),
    (((10, 0), "auto", None), "FLASHINFER", 256, 256, None, [False, True]),
    # The builder keeps the target's head size and never reads it.
    (((8, 0), "auto", "FLEX_ATTENTION"), "FLEX_ATTENTION", 136, 128, None, None),
]
REFUSALS = [
    ('heads of 260 channels with kv_cache_dtype=auto; .*"TRITON_ATTN" in the speculative config'),
    ('heads of 131 channels with kv_cache_dtype=fp8; .*"FLASHINFER" in the speculative config'),
    ('heads of 131 channels with kv_cache_dtype=fp8; .*"FLASHINFER" in the speculative config'),
    ('with kv_cache_dtype=int8_per_token_head; .*set "attention_backend": "TRITON_ATTN" in the'),
    ("heads of 518 channels with kv_cache_dtype=fp8; .*image rows; leave kv_cache_dtype out"),
]

# While the configuration is built nothing imports FlashInfer: then nothing is known, or no other
# backend is stated.
STARTS = [
    "^no objection$",
    "^no objection$",
    'heads of 131 channels with kv_cache_dtype=fp8; .*set "attention_backend": "FLASHINFER"',
    'heads of 131 channels with kv_cache_dtype=fp8; .*set "attention_backend": "FLASHINFER"',
    "^no objection$",
]
# Layers of a kind of their own: what they ask the selector for beyond a plain layer, and what
# backend and head size they get.
ASKED: list[tuple[dict[str, Any], Any]] = [
    ({}, ["auto", {}, "FLASH_ATTN 136"]),
    (
        {"per_layer_sliding_window": 64},
        ["auto", {"has_sliding_window": True}, "FLASH_ATTN 136"],
    ),
    ({"sinks": [0.0] * 4}, ["auto", {"has_sink": True}, "FLASH_ATTN 136"]),
    ({"kv_cache_scheme": "tensor"}, ["fp8", {}, "FLASH_ATTN 144"]),
    (
        {"kv_cache_scheme": "attn_head"},
        ["fp8", {"use_per_head_quant_scales": True}, "FLASH_ATTN 144"],
    ),
    # In a model whose images see themselves as a whole.
    ({"is_mm_prefix_lm": True}, ["auto", {"use_mm_prefix": True}, "TRITON_ATTN 136"]),
]

HEADS = 4
CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("release", ["0.32", pytest.param("0.33", marks=pytest.mark.overlay)])
def test_backends_and_head_sizes(release: str) -> None:
    child = Child({"PYTHONPATH": overlay_folder()} if release == "0.33" else {}, timeout=300)
    said: dict[str, list[Any]] = child.call(everything)
    child.close()
    expected = [
        [*words.split(), *(cell.strip() for cell in cells)]
        for words, *cells in (line.split("|") for line in EXPECTED.strip().splitlines())
    ]
    assert said["heads"] == expected
    assert said["asked"] == [asked for _, asked in ASKED]
    assert said["layers"] == [layer for _, *layer in BUILT]
    lines, patterns = [*said["refusals"], *said["starts"]], [*REFUSALS, *STARTS]
    for line, pattern in zip(lines, patterns, strict=True):
        assert "\n" not in line
        assert re.search(pattern, line), line


# What follows runs in the child.


def everything() -> dict[str, list[Any]]:
    """Return, in one process, what the functions below say."""
    engine = Engine(128)
    functions = (heads, refusals, layers, asked, starts)
    return {function.__name__: list(function(engine)) for function in functions}


def heads(engine: Engine) -> Iterator[list[str]]:
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
        for cache_dtype in ("auto", "fp8"):
            for capability in CAPABILITIES:
                cells = []
                for size in (64, 80, 96, 128):
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


def layers(engine: Engine) -> Iterator[list[Any]]:
    """Yield what drafts' layers and their metadata builders hold, once they are really built."""
    import torch

    for (capability, cache_dtype, backend), *_ in BUILT:
        with engine.on(capability, cache_dtype, backend) as config:
            layer = engine.draft_layer(config)
            spec = layer.attn.get_kv_cache_spec(config)
            build = layer.attn.attn_backend.get_builder_cls()
            builder = build(spec, [layer.attn.layer_name], config, torch.device("meta"))
            scratch = getattr(builder, "softmax_segm_output", None)
            sizes = {layer.padded_size, layer.attn.impl.head_size, spec.head_size, spec.head_size_v}
            yield [
                layer.attn.attn_backend.get_name(),
                *sizes,
                getattr(builder, "head_dim", getattr(builder, "headdim", None)),
                None if scratch is None else list(scratch.shape),
                _shares_workspaces(builder),
            ]


def asked(engine: Engine) -> Iterator[list[Any]]:
    """Yield what kinds of layers ask the selector for, beyond what is usual, and their backend."""
    from vllm_vispec.models.padded_heads import BackendFinder, choose_padded_head

    usual: dict[str, Any] = {}
    for settings, _ in ASKED:
        scheme = settings.get("kv_cache_scheme")
        quantization = scheme and SimpleNamespace(kv_cache_scheme={"strategy": scheme})
        own = {k: v for k, v in settings.items() if k in ("per_layer_sliding_window", "sinks")}
        vars(engine.config.model_config)["is_mm_prefix_lm"] = "is_mm_prefix_lm" in settings
        with engine.on((9, 0), "auto") as config:
            finder = BackendFinder.of_layer(
                HEADS,
                128,
                128**-0.5,
                cache_config=config.cache_config,
                quant_config=quantization,
                prefix="layers.0",
                **own,
            )
            usual = usual or finder.options
            head = choose_padded_head(finder, 128, 131)
            assert head is not None
            changed = {k: v for k, v in finder.options.items() if v != usual[k]}
            yield [finder.kv_cache_dtype, changed, f"{head.backend.get_name()} {head.size}"]
    vars(engine.config.model_config)["is_mm_prefix_lm"] = False


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
            self.hf_config.save_pretrained(folder)
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
