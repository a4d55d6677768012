"""From a finished run to a head folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.state import Checkpoints, Progress
from vllm_vispec.train.trainer import Trainer


def export_trained(
    config: TrainConfig,
    trainer: Trainer,
    checkpoints: Checkpoints,
    progress: Progress,
    folder: Path,
    provenance: Mapping[str, Any],
) -> None:
    """Write the head that `run.export` names (the average of its weights if there is one).

    Raises:
        ViSpecError: the folder cannot be written.
    """
    from vllm_vispec.heads.export import export_head

    step = progress.step
    if config.run.export == "best" and progress.best_step is not None:
        step = progress.best_step
    groups = checkpoints.load(step).groups
    draft = trainer.draft_with(groups.get("average") or groups["weights"])
    export_head(
        draft.cpu(),
        folder,
        target=config.target.model,
        dtype=config.head.dtype,
        num_speculative_tokens=config.run.num_draft_tokens,
        provenance={**provenance, "exported_step": step},
        overwrite=True,
    )
