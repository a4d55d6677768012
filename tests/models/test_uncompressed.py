"""Where a draft without compression puts the vision tower's output; which of it stays."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_vispec.models.uncompressed import EagleViSpecEmbedsForCausalLM as Draft
from vllm_vispec.v1.proposer import StayingRows, ViSpecProposer, staying_rows

TABLE = torch.arange(40.0).view(10, 4)


def embed(ids: list[int], **kwargs: object) -> torch.Tensor:
    inner = SimpleNamespace(
        embed_tokens=lambda index: TABLE[index], vision_size=4, image_inputs=lambda rows_NW: rows_NW
    )
    fake = SimpleNamespace(model=inner)
    found: torch.Tensor = Draft.embed_input_ids(fake, torch.tensor(ids), **kwargs)  # type: ignore[arg-type]
    return found


def test_first_columns_go_where_the_mask_says() -> None:
    """Two images, one with deepstack's additional columns left out; the table is not written."""
    before, mask = TABLE.clone(), torch.tensor([False, True, True, False, True])
    images = [-torch.ones(2, 12), -2 * torch.ones(1, 12)]
    found = embed([1, 9, 9, 2, 9], multimodal_embeddings=images, is_multimodal=mask)
    assert torch.equal(found[[0, 3]], TABLE[[1, 2]])
    assert found[[1, 2, 4], 0].tolist() == [-1, -1, -2]
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
    proposer._staying_rows = StayingRows(torch.empty(3, device="meta"), staying)
    mask = torch.tensor([False, False, False, True, True])
    for _ in range(2):
        proposer.build_model_inputs_first_pass(3, 3, (["image"], mask))
    assert seen[0][2][0] == ["image"]
    assert seen[0][2][1].tolist() == [False, True, True]
    # Used once: the next round's batch may be padded.
    assert seen[1][2][1] is mask
