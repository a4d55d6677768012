"""Where a draft without compression puts the vision tower's output; which of it stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_vispec.models.uncompressed import EagleViSpecEmbedsForCausalLM as Draft
from vllm_vispec.v1.proposer import ViSpecProposer, staying_rows

TABLE = torch.arange(40.0).view(10, 4)


def embed(ids: list[int], factor: int = 1, **kwargs: Any) -> torch.Tensor:
    """Embed with a draft whose image inputs are its vision tower's two columns, times a factor."""
    inner = SimpleNamespace(
        embed_tokens=lambda index: TABLE[index],
        vision_size=2,
        # Twice as wide: a draft VLM's projector changes the width, too.
        image_inputs=lambda rows_NW: factor * rows_NW.repeat(1, 2),
    )
    fake: Any = SimpleNamespace(model=inner)
    return Draft.embed_input_ids(fake, torch.tensor(ids), **kwargs)


@pytest.mark.parametrize("factor", [1, -1])
def test_image_inputs_go_where_the_mask_says(factor: int) -> None:
    """Two images, whose columns beyond the vision size are left out; the table is not written."""
    before, mask = TABLE.clone(), torch.tensor([False, True, True, False, True])
    images = [torch.arange(8.0).view(2, 4), torch.full((1, 2), 9.0)]
    found = embed([1, 7, 7, 2, 7], factor, multimodal_embeddings=images, is_multimodal=mask)
    assert torch.equal(found[[0, 3]], TABLE[[1, 2]])
    wanted = torch.tensor([[0.0, 1, 0, 1], [4, 5, 4, 5], [9, 9, 9, 9]])
    assert torch.equal(found[[1, 2, 4]], factor * wanted)
    assert torch.equal(TABLE, before)


def test_text_only() -> None:
    nothing = torch.zeros(2, dtype=torch.bool)
    for kwargs in ({}, {"multimodal_embeddings": [], "is_multimodal": nothing}):
        assert torch.equal(embed([3, 4], **kwargs), TABLE[[3, 4]])


def test_rejected_tokens_leave_the_mask(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Batches without padding: vLLM's mask covers all scheduled tokens, the draft's inputs not."""
    seen = []
    monkeypatch.setattr(
        "vllm.v1.spec_decode.eagle.EagleProposer.build_model_inputs_first_pass",
        lambda self, *args: seen.append(args),
    )
    proposer = object.__new__(ViSpecProposer)
    staying = staying_rows(torch.tensor([0, 3, 5]), torch.tensor([0, 1, 3]))
    assert staying.tolist() == [0, 3, 4]
    proposer._staying_rows = torch.empty(3, device="meta"), staying
    mask = torch.tensor([False, False, False, True, True])
    for _ in range(2):
        proposer.build_model_inputs_first_pass(3, 3, (["image"], mask))
    assert seen[0][2][0] == ["image"]
    assert seen[0][2][1].tolist() == [False, True, True]
    # Used once: the next round's batch may be padded.
    assert seen[1][2][1] is mask
