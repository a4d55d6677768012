"""What `vispec bench profile` touches in vLLM beyond its public names.

`vispec bench run` reads a draft's image table, if it has one, and touches nothing else.
"""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"

_V1_DRAFTER = PatchPoint(_V1_RUNNER, "GPUModelRunner.self.drafter", (), "reads", "what drafts")
_V2_DRAFTER = PatchPoint(_V2_RUNNER, "GPUModelRunner.self.speculator", (), "reads", "what drafts")
_V1_DRAFT_SAMPLE = PatchPoint(
    "vllm.v1.spec_decode.llm_base_proposer",
    "SpecDecodeBaseProposer._sample_draft_tokens",
    ("hidden_states",),
    "wraps",
    "draft sampling",
)

PROFILE = PatchGroup(
    name="profile",
    feature="vispec bench profile and vispec verify",
    remedy="",
    v1=(
        _V1_DRAFTER,
        _V1_DRAFT_SAMPLE,
        PatchPoint(
            _V1_RUNNER,
            "GPUModelRunner._sample",
            ("logits",),
            "wraps",
            "verification and sampling",
        ),
    ),
    v2=(
        _V2_DRAFTER,
        PatchPoint(
            "vllm.v1.worker.gpu.spec_decode.speculator",
            "DraftModelSpeculator.sample_draft",
            ("hidden_states",),
            "wraps",
            "draft sampling",
        ),
        PatchPoint(
            _V2_RUNNER,
            "GPUModelRunner.sample",
            ("hidden_states",),
            "wraps",
            "verification and sampling",
        ),
    ),
)
