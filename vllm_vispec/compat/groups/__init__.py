"""Groups of patch points, one module for each feature."""

from vllm_vispec.compat.groups.adaptive import ADAPTIVE
from vllm_vispec.compat.groups.bench import BENCH
from vllm_vispec.compat.groups.chains import CHAINS
from vllm_vispec.compat.groups.core import CORE
from vllm_vispec.compat.groups.draft_vlm import DRAFT_VLM
from vllm_vispec.compat.groups.draft_vocab import DRAFT_VOCAB
from vllm_vispec.compat.groups.gate import GATE
from vllm_vispec.compat.groups.padded_heads import PADDED_HEADS, SCRATCH
from vllm_vispec.compat.groups.profile import PROFILE
from vllm_vispec.compat.groups.self_serving import SELF_SERVING
from vllm_vispec.compat.groups.trees import TREES
from vllm_vispec.compat.groups.uncompressed import UNCOMPRESSED
from vllm_vispec.compat.groups.verify import VERIFY, VERIFY_ATTENTION

__all__ = [
    "ADAPTIVE",
    "BENCH",
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
    BENCH,
    PROFILE,
    VERIFY,
    VERIFY_ATTENTION,
)
"""All groups, in the order in which `vispec doctor` prints them."""
