"""What `vispec bench` touches in vLLM beyond its command line; checked before a run."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_COMMON = (
    PatchPoint(
        "vllm.entrypoints.cli.main",
        "main",
        (),
        "calls",
        "`vllm bench serve`, again and again in one process",
    ),
    PatchPoint(
        "vllm.config.parallel",
        "ParallelConfig.worker_extension_cls",
        (),
        "reads",
        "--worker-extension-cls adds our method to the workers",
    ),
    PatchPoint(
        "vllm.entrypoints.serve.dev.rpc.api_router",
        "collective_rpc",
        ("raw_request",),
        "calls",
        "asks the workers over HTTP, in development mode",
    ),
)

_V1 = (
    PatchPoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.drafter",
        (),
        "reads",
        "where the draft's image table is",
    ),
)

_V2 = (
    PatchPoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.self.speculator",
        (),
        "reads",
        "where the draft's image table is",
    ),
)

BENCH = PatchGroup(
    name="bench",
    feature="vispec bench",
    remedy="",
    common=_COMMON,
    v1=_V1,
    v2=_V2,
)
