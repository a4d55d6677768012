"""The same recipe as a Ray Train job, on one node or several.

Every worker runs `vllm_vispec.train.loop.train`; Ray starts the processes and joins them. All nodes
must see the same files: the target, the data and run.output on shared storage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_vispec.train.config import TrainConfig, config_from_flat
from vllm_vispec.train.distributed import TIMEOUT
from vllm_vispec.train.run_log import command_line
from vllm_vispec.utils.errors import ViSpecError

# Ray changes the working directory of its workers, so paths must not depend on it.
_PATHS = (
    "target.model",
    "head.init_from",
    "data.train",
    "data.validation",
    "data.image_root",
    "teacher.cache_dir",
    "run.output",
)


def train_on_ray(
    config: TrainConfig, workers: int, override: tuple[str, ...] = (), cache_only: bool = False
) -> str:
    """Run a recipe on so many Ray workers; returns the main worker's last line.

    Joins the cluster that RAY_ADDRESS names, else starts one on this machine.

    Raises:
        ViSpecError: Ray Train is not installed, the cluster is too small, or the run failed; a
            failed run goes on from its last checkpoint when the same command is run again.
    """
    try:
        import ray
        from ray import train
        from ray.train import torch as torch_train
    except ImportError as error:
        raise ViSpecError(
            f"--ray needs Ray Train ({error}): pip install 'vllm-vispec[ray]'"
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=True)
    use_gpu = _use_gpu(ray.cluster_resources(), config.run.device, workers)
    job = {
        "config": _absolute(config),
        "override": list(override),
        "cache_only": cache_only,
        "command": command_line(),
    }
    output = Path(config.run.output).absolute()
    trainer = torch_train.TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        torch_config=torch_train.TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())
        ),
        run_config=train.RunConfig(name="ray", storage_path=str(output)),
    )
    try:
        result = trainer.fit()
    # Ray wraps a worker's error in its own types, which differ between its versions.
    except Exception as error:
        raise ViSpecError(_reason(error)) from error
    return str(getattr(result, "return_value", None) or f"finished; see {output}")


def _use_gpu(resources: Mapping[str, float], device: str, workers: int) -> bool:
    """Whether each worker gets a GPU; with run.device auto wherever the cluster has any."""
    use_gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) > 0)
    for resource in ("CPU", "GPU") if use_gpu else ("CPU",):
        if resources.get(resource, 0) < workers:
            raise ViSpecError(
                f"--workers {workers} needs {workers} {resource}, the Ray cluster has "
                f"{resources.get(resource, 0):g}: use fewer workers or add nodes"
                + (", or train on CPUs with run.device=cpu" if resource == "GPU" else "")
            )
    if device == "auto" and not use_gpu:
        print("the Ray cluster has no GPU: its workers train on CPUs", file=sys.stderr)
    return use_gpu


def _absolute(config: TrainConfig) -> TrainConfig:
    """The recipe with absolute paths; hub ids stay as they are."""
    flat = config.flat()
    for name in _PATHS:
        given = [flat[name]] if isinstance(flat[name], str) else flat[name]
        # Outputs need not exist yet.
        is_output = name in ("run.output", "teacher.cache_dir")
        paths = [
            str(Path(path).absolute()) if path and (is_output or Path(path).exists()) else path
            for path in given
        ]
        flat[name] = paths[0] if isinstance(flat[name], str) else paths
    return config_from_flat(flat)


def _worker(job: Mapping[str, Any]) -> str:
    """What every worker does."""
    from vllm_vispec.train.distributed import processes
    from vllm_vispec.train.loop import fill_cache, train

    config: TrainConfig = job["config"]
    with processes(config.run.device) as group:
        if job["cache_only"]:
            return fill_cache(config, group)
        return train(config, group, job["override"], job["command"]).message


def _reason(error: BaseException) -> str:
    """One line: our own error's text if a worker raised one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marker = "ViSpecError: "
    ours = [line.partition(marker)[2] for line in lines if marker in line]
    if ours:
        return ours[0].replace("\\n", " ").strip("'\") ")
    last = lines[-1] if lines else type(error).__name__
    return f"the Ray job failed ({last}): see Ray's log, then run the same command again to go on"
