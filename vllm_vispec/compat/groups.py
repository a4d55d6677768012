"""Groups of patch points, one module for each feature."""

from vllm_vispec.bench.patch_points import PROFILE
from vllm_vispec.compressors.patch_points import GATE
from vllm_vispec.draft_vlm.patch_points import DRAFT_VLM
from vllm_vispec.draft_vocab.patch_points import DRAFT_VOCAB
from vllm_vispec.heads.patch_points import SELF_SERVING
from vllm_vispec.models.padded_heads_patch_points import PADDED_HEADS, SCRATCH
from vllm_vispec.models.uncompressed_patch_points import UNCOMPRESSED
from vllm_vispec.spec_decode.adaptive_patch_points import ADAPTIVE
from vllm_vispec.spec_decode.chain_patch_points import CHAINS
from vllm_vispec.spec_decode.patch_points import CORE
from vllm_vispec.trees.patch_points import TREES
from vllm_vispec.verify.patch_points import VERIFY, VERIFY_ATTENTION

__all__ = [
    "ADAPTIVE",
    "CHAINS",
    "CORE",
    "DRAFT_VLM",
    "DRAFT_VOCAB",
    "GATE",
    "GROUPS",
    "PADDED_HEADS",
    "PROFILE",
    "SCRATCH",
    "SELF_SERVING",
    "TREES",
    "UNCOMPRESSED",
    "VERIFY",
    "VERIFY_ATTENTION",
]

GROUPS = (
    CORE,
    CHAINS,
    PADDED_HEADS,
    SCRATCH,
    UNCOMPRESSED,
    GATE,
    DRAFT_VLM,
    DRAFT_VOCAB,
    ADAPTIVE,
    TREES,
    SELF_SERVING,
    PROFILE,
    VERIFY,
    VERIFY_ATTENTION,
)
"""All groups, in the order in which `vispec doctor` prints them."""
