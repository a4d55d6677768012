"""What `vispec bench profile` relies on in vLLM; `vispec verify` looks into runners as it does.

The attention check of `vispec verify` calls private functions, too: what does not fit there is that
backend's failure. `vispec bench run` reads a draft's image table, if it has one, and relies on
nothing private.
"""

from vllm_vispec.compat.patch_point import PatchGroup, reads, wraps

_FEATURE = "vispec bench profile and vispec verify"

GROUPS = (
    PatchGroup(
        name="profile",
        feature=_FEATURE,
        remedy="",
        runner="v2",
        points=(
            wraps(
                "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
                "{sample(hidden_states), self.speculator}",
                "verification and sampling; what drafts",
            ),
            wraps(
                "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.sample_draft"
                "(hidden_states)",
                "draft sampling",
            ),
        ),
    ),
    PatchGroup(
        name="profile",
        feature=_FEATURE,
        remedy="",
        runner="v1",
        points=(
            wraps(
                "vllm.v1.worker.gpu_model_runner:GPUModelRunner{_sample(logits), self.drafter}",
                "verification and sampling; what drafts",
            ),
            wraps(
                "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer._sample_draft_tokens"
                "(hidden_states)",
                "draft sampling",
            ),
        ),
    ),
    PatchGroup(
        name="verify",
        feature="vispec verify",
        remedy="",
        points=(
            reads(
                "vllm.compilation.cuda_graph:CUDAGraphWrapper"
                "{_all_instances, self.concrete_cudagraph_entries}",
                "which CUDA graphs were captured",
            ),
        ),
    ),
    PatchGroup(
        name="verify",
        feature="vispec verify",
        remedy="",
        runner="v2",
        points=(
            reads(
                "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.self.graphs",
                "which full CUDA graphs were captured",
            ),
        ),
    ),
)
