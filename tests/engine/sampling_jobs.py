"""Child-process jobs of the sampling tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engine.workloads import Request, drive, image_text, words
from tests.support import engine


def soften(target: Path, folder: Path, factor: float) -> Path:
    """Copy ``target`` with its logits scaled by ``factor``: tiny targets are sure of themselves."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(target, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sample(
    kind: str, setups: list[dict[str, Any]], count: int, num_tokens: int
) -> Iterator[dict[str, Any]]:
    """Draw ``count`` continuations of one prompt at temperature 1 from each setup's engine.

    The process-wide generator is seeded differently for each setup. Seeds of single requests would
    not do: with them, V1 on CPU fails as soon as a prompt is split ("CPU Generator does not use
    offset"), with and without speculation.
    """
    import torch

    for index, setup in enumerate(setups):
        with engine.engine(engine.EngineOptions(**setup["options"])) as llm:
            torch.manual_seed(1000 + index)
            settings = {"temperature": 1.0, "n": count}
            text = f"{image_text(kind, 1)} {words(8, 6)}"
            request = Request("draws", text, (3,), num_tokens, settings)
            found = drive(llm, [request])["draws"]
            yield {
                "name": setup["name"],
                "tokens": [item.token_ids for item in found],
                "accepted": sum(sum(item.accepted_draft) for item in found),
                "drafted": sum(sum(item.drafted) for item in found),
            }
