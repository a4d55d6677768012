"""Where `vispec bench` touches vLLM beyond its command line; checked before a run."""

from vllm_vispec.seam_entry import Seam

BENCH_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.entrypoints.cli.main",
        "main",
        (),
        "calls",
        "`vllm bench serve`, again and again in one process",
    ),
    Seam(
        "vllm.config.parallel",
        "ParallelConfig.worker_extension_cls",
        (),
        "reads",
        "--worker-extension-cls adds our method to the workers",
    ),
    Seam(
        "vllm.entrypoints.serve.dev.rpc.api_router",
        "collective_rpc",
        ("raw_request",),
        "calls",
        "asks the workers over HTTP, in development mode",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.drafter",
        (),
        "reads",
        "V1: where the draft's image table is",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.self.speculator",
        (),
        "reads",
        "V2: where the draft's image table is",
    ),
)
