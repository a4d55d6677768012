"""Where `vispec bench` touches vLLM beyond its command line; checked before a run."""

from vllm_vispec.compat.patch_point import PatchPoint

BENCH_POINTS: tuple[PatchPoint, ...] = (
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
    PatchPoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.drafter",
        (),
        "reads",
        "V1: where the draft's image table is",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.self.speculator",
        (),
        "reads",
        "V2: where the draft's image table is",
    ),
)
