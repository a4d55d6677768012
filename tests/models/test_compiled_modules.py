"""Modules that hold compiled models keep their annotations as objects.

vLLM's ``support_torch_compile`` finds the dynamic dimensions by comparing annotations with
``torch.Tensor``; strings are unlike it, so that a dimension would be missed or a class refused.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_vispec"
COMPILED = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if "\n@support_torch_compile" in path.read_text()
)


def test_drafts_are_compiled() -> None:
    assert COMPILED == ["draft_vlm/model.py", "models/uncompressed.py", "models/vispec.py"]


@pytest.mark.parametrize("name", COMPILED)
def test_annotations_are_objects(name: str) -> None:
    text = (PACKAGE / name).read_text()
    assert "from __future__ import annotations" not in text


def test_every_tensor_of_a_draft_is_dynamic() -> None:
    from vllm_vispec.draft_vlm.model import DraftVlmModel
    from vllm_vispec.models.uncompressed import EmbedsModel
    from vllm_vispec.models.vispec import ViSpecModel

    for model in (ViSpecModel, EmbedsModel, DraftVlmModel):
        parameters = list(inspect.signature(model.forward).parameters.values())[1:]
        assert [parameter.annotation for parameter in parameters] == [torch.Tensor] * len(
            parameters
        )
