"""Child-process job: a head named by its hub id, front process and worker on two "machines"."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import engine

OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def serve(kind: str, target: str, settings: dict[str, Any], caches: list[str]) -> dict[str, Any]:
    """Serve a mixed batch; the caches are that of the front process and that of its workers.

    The front process has read its own (``HF_HUB_CACHE``) when the module was imported. Once the
    configuration is built, that cache is removed and the processes still to come are told of the
    other one.
    """
    engine.prepare_process()
    engine.register_plugin()
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    drafts: list[Any] = []

    def created(args: EngineArgs, *rest: Any, **kwargs: Any) -> Any:
        config = create(args, *rest, **kwargs)
        if caches:
            front, workers = map(Path, caches)
            shutil.rmtree(front)
            os.environ["HF_HUB_CACHE"] = str(workers)
        drafts.append(config.speculative_config.draft_model_config)
        return config

    EngineArgs.create_engine_config = created
    options: dict[str, Any] = {"model": target, **OPTIONS}
    options["extra"] = {
        "speculative_config": {"method": "vispec", "num_speculative_tokens": 4, **settings},
        "per_request_spec_decode_metrics": "detailed",
    }
    try:
        with engine.engine(engine.EngineOptions(**options)) as llm:
            results = as_json(drive(llm, mixed_requests(kind, 4, 12)))
    finally:
        EngineArgs.create_engine_config = create
    return {"results": results, "model": drafts[0].model, "revision": drafts[0].revision}


def find_head(model: str, revision: str) -> str:
    """Look for a head as a worker does; returns the error."""
    from types import SimpleNamespace

    from vllm_vispec.heads.location import head_folder
    from vllm_vispec.utils.errors import ViSpecError

    try:
        head_folder(SimpleNamespace(model=model, revision=revision))
    except ViSpecError as error:
        return str(error)
    return ""
