"""What padded attention heads, and drafts that read the images' embeddings, rely on in vLLM."""

from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, calls, reads, wraps
from vllm_vispec.compat.patching import patch
from vllm_vispec.config import head_of, hides_images, reads_embeddings
from vllm_vispec.heads.config import ARCHITECTURE
from vllm_vispec.trees.limits import has_branches

_BACKENDS = "vllm.v1.attention.backends"
_REMEDY = "use a head without image compression, and no tree"


def _has_padded_heads(vllm_config: Any) -> bool:
    is_masked = head_of(vllm_config).architecture == ARCHITECTURE or hides_images(vllm_config)
    return is_masked or has_branches(vllm_config)


def _needs_scratch(vllm_config: Any) -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() and _has_padded_heads(vllm_config)


def apply_scratch() -> None:
    """Let the Triton backend make its scratch as wide as a layer's heads; CPUs have none."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

    from vllm_vispec.models.padded_heads import init_triton_builder

    patch(TritonAttentionMetadataBuilder, "__init__", init_triton_builder)


def apply_workspace(backend: Any) -> None:
    """Let layers that were given FlashInfer share a workspace only if it is large enough.

    Importing FlashInfer initialises the device; by now vLLM's selector has done so.
    """
    if backend.get_name() != "FLASHINFER":
        return
    from vllm.v1.attention.backends.flashinfer import FlashInferMetadataBuilder

    from vllm_vispec.models.padded_heads import set_workspace_buffer

    patch(FlashInferMetadataBuilder, "set_workspace_buffer", set_workspace_buffer)


PADDED_HEADS = PatchGroup(
    name="padded heads",
    feature="attention heads with more channels, of heads that compress images and of draft trees",
    remedy=_REMEDY,
    is_needed=_has_padded_heads,
    points=(
        wraps(
            "vllm.model_executor.layers.attention.attention:Attention.__init__(num_heads, "
            "head_size, scale, num_kv_heads, cache_config, quant_config, prefix, attn_type, "
            "attn_backend)",
            "its call of the selector is read off and made for padded head sizes; then the layer "
            "is built with the backend found",
        ),
        calls(
            "vllm.v1.kv_cache_interface:get_kv_quant_mode(kv_cache_dtype)",
            "whether keys and values are quantized; decides the step of head sizes",
        ),
    ),
)

SCRATCH = PatchGroup(
    name="scratch",
    feature="attention heads with more channels on a GPU",
    remedy=_REMEDY,
    is_needed=_needs_scratch,
    apply=apply_scratch,
    points=(
        wraps(
            f"{_BACKENDS}.triton_attn:TritonAttentionMetadataBuilder"
            "{__init__(kv_cache_spec), self.softmax_segm_output}",
            "split-K scratch as wide as the layer's heads; vLLM takes the model's",
        ),
        wraps(
            f"{_BACKENDS}.flashinfer:FlashInferMetadataBuilder.set_workspace_buffer"
            "(workspace_buffer)",
            "on V2, a layer shares the target's workspace only if that is large enough",
        ),
        reads(
            f"{_BACKENDS}.flashinfer:FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM",
            "how large a workspace vLLM would make",
        ),
    ),
)

UNCOMPRESSED = PatchGroup(
    name="uncompressed",
    feature="heads without image compression",
    remedy="use a head that compresses images",
    runner="v2",
    is_needed=reads_embeddings,
    points=(
        reads(
            "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.gather_mm_embeddings"
            "(draft_lookahead)",
            "embeddings of the tokens one ahead of the target's",
        ),
    ),
)

GROUPS = (PADDED_HEADS, SCRATCH, UNCOMPRESSED)
