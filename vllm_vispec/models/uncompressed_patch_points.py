"""What drafts that read the images' embeddings rely on in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint
from vllm_vispec.config import reads_embeddings

UNCOMPRESSED = PatchGroup(
    name="uncompressed",
    feature="heads without image compression",
    remedy="use a head that compresses images",
    runner="v2",
    is_needed=reads_embeddings,
    points=(
        PatchPoint(
            "reads",
            "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.gather_mm_embeddings"
            "(draft_lookahead)",
            "embeddings of the tokens one ahead of the target's",
        ),
    ),
)

GROUPS = (UNCOMPRESSED,)
