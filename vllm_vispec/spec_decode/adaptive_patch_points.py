"""What adaptive verification touches in vLLM; it exists on the V2 model runner only."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_V2_BATCH = "vllm.v1.worker.gpu.input_batch"

_V2 = (
    PatchPoint(
        _V2_BATCH,
        "InputBatch.num_draft_tokens_per_req",
        (),
        "reads",
        "draft tokens before the device cut them",
    ),
    PatchPoint(
        _V2_BATCH,
        "InputBatch.query_start_loc",
        (),
        "reads",
        "where requests begin after the cut",
    ),
)

ADAPTIVE = PatchGroup(
    name="adaptive verification",
    feature="enable_adaptive_verification with a ViSpec head",
    remedy='leave "enable_adaptive_verification" out of the speculative config',
    v2=_V2,
)
