"""What `vispec verify` relies on in vLLM beyond what it shares with `vispec bench profile`.

Its attention check calls private functions, too: what does not fit there is that backend's failure.
"""

from vllm_vispec.compat.patch_point import PatchGroup, reads

_FEATURE = "vispec verify"

GROUPS = (
    PatchGroup(
        name="verify",
        feature=_FEATURE,
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
        feature=_FEATURE,
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
