"""What `vispec bench profile` relies on in vLLM; `vispec verify` looks into runners as it does.

The attention check of `vispec verify` calls private functions, too: what does not fit there is that
backend's failure. `vispec bench run` reads a draft's image table, if it has one, and relies on
nothing private.
"""

from vllm_vispec.compat.patch_point import PatchGroup, reads, wraps

_FEATURE = "vispec bench profile and vispec verify"
_RUNNER, _DRAFT = "verification and sampling; what drafts", "draft sampling"

_V2 = (
    wraps(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner{sample(hidden_states), self.speculator}",
        _RUNNER,
    ),
    wraps(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.sample_draft"
        "(hidden_states)",
        _DRAFT,
    ),
)
_V1 = (
    wraps("vllm.v1.worker.gpu_model_runner:GPUModelRunner{_sample(logits), self.drafter}", _RUNNER),
    wraps(
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer._sample_draft_tokens"
        "(hidden_states)",
        _DRAFT,
    ),
)
_GRAPHS = reads(
    "vllm.compilation.cuda_graph:CUDAGraphWrapper{_all_instances, self.concrete_cudagraph_entries}",
    "which CUDA graphs were captured",
)
_FULL_GRAPHS = reads(
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.self.graphs",
    "which full CUDA graphs were captured",
)
GROUPS = (
    PatchGroup("profile", _FEATURE, remedy="", points=_V2, runner="v2"),
    PatchGroup("profile", _FEATURE, remedy="", points=_V1, runner="v1"),
    PatchGroup("verify", "vispec verify", remedy="", points=(_GRAPHS,)),
    PatchGroup("verify", "vispec verify", remedy="", points=(_FULL_GRAPHS,), runner="v2"),
)
