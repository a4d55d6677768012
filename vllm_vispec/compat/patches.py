"""All changes of vLLM's classes and functions, one function for each group of patch points.

Each may be called any number of times.  Those of the core run when the plugin is loaded, the others
in workers whose engine uses the feature.  What concerns one engine alone (its model runner, model
state or encoder cache) is patched where that object is found; search for ``patch(``.
"""

from typing import Any

from vllm.platforms import current_platform

from vllm_vispec.compat.patch_point import Runner
from vllm_vispec.compat.patching import patch


def apply_core_patches() -> None:
    """Let vLLM's configuration accept ViSpec heads, and let workers begin with ours."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_vispec.spec_decode import config_hook, worker_hook

    patch(EngineArgs, "create_speculative_config", config_hook.create_speculative_config)
    patch(EngineArgs, "create_engine_config", config_hook.create_engine_config)
    patch(WorkerBase, "__init__", worker_hook.init_worker)


def apply_self_serving_patches() -> None:
    """Let ``vllm serve HEAD`` find the target that a head names."""
    from vllm.engine import arg_utils

    from vllm_vispec.heads import speculators

    # `EngineArgs` finds the function in its own module.
    patch(arg_utils, "maybe_override_with_speculators", speculators.resolve_target)


def apply_tree_scheduler_patches() -> None:
    """Let schedulers reserve what trees need; they run in processes without a worker, too."""
    from vllm.config import VllmConfig

    from vllm_vispec.trees import slots

    patch(VllmConfig, "num_lookahead_tokens", slots.num_lookahead_tokens)


def apply_chain_patches(runner: Runner) -> None:
    """Let a model runner draft with ViSpec heads."""
    from vllm_vispec.spec_decode import worker_hook

    if runner == "v2":
        from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

        patch(EagleSpeculator, "__new__", worker_hook.new_speculator)
        return
    from vllm.v1.spec_decode.eagle import EagleProposer

    patch(EagleProposer, "__new__", worker_hook.new_proposer)
    if current_platform.is_cpu():
        apply_cpu_sampling_patches()
        _apply_cpu_gemm_patches()


def apply_cpu_sampling_patches() -> None:
    """Let the V1 model runner sample with the right temperatures on CPUs."""
    from vllm.v1.sample import rejection_sampler

    from vllm_vispec.v1 import cpu_sampling

    patch(rejection_sampler, "expand_batch_to_tokens", cpu_sampling.instead)


def _apply_cpu_gemm_patches() -> None:
    from vllm._custom_ops import CPUDNNLGEMMHandler

    from vllm_vispec.v1 import cpu_gemm

    patch(CPUDNNLGEMMHandler, "__del__", cpu_gemm.release)


def apply_scratch_patches() -> None:
    """Let the Triton backend make its scratch as wide as a layer's heads."""
    if current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

    from vllm_vispec.models import attention_scratch

    patch(TritonAttentionMetadataBuilder, "__init__", attention_scratch.init_triton_builder)


def apply_workspace_patches(backend: Any) -> None:
    """Let layers that were given FlashInfer share a workspace only if it is large enough.

    Importing FlashInfer initialises the device; by now vLLM's selector has done so.
    """
    if backend.get_name() != "FLASHINFER":
        return
    from vllm.v1.attention.backends.flashinfer import FlashInferMetadataBuilder

    from vllm_vispec.models import attention_scratch

    patch(FlashInferMetadataBuilder, "set_workspace_buffer", attention_scratch.set_workspace_buffer)


def apply_tree_patches(runner: Runner) -> None:
    """Let attention layers have room for path codes, and the V2 model runner verify trees."""
    from vllm.model_executor.layers.attention import Attention

    from vllm_vispec.trees import attention

    patch(Attention, "__init__", attention.init_padded)
    patch(Attention, "get_kv_cache_spec", attention.padded_kv_cache_spec)
    if runner == "v2":
        from vllm.v1.worker.gpu.model_states.interface import ModelState

        from vllm_vispec.trees import model_state as v2_state

        patch(ModelState, "custom_sampler", v2_state.custom_sampler)
