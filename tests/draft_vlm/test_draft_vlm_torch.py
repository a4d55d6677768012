"""The draft VLM in PyTorch: what a row reads, and chains with a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.heads import (
    DRAFT_VLM,
    TYPICAL,
    random_draft_vlm,
    random_prompt,
    write_draft_vlm,
    write_head,
)
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.reference import DraftVlm, ViSpecDraft, tensor_shapes
from vllm_vispec.utils.errors import ViSpecError

RUNS = {
    "inside": ((3, 9),),
    "two, touching": ((2, 5), (5, 8)),
    "at both ends": ((0, 4), (11, 14)),
    "none": (),
}
EACH = pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)


@EACH
@pytest.mark.parametrize("tied", [False, True])
def test_a_chain_equals_full_passes(runs: tuple[tuple[int, int], ...], tied: bool) -> None:
    draft = random_draft_vlm(replace(DRAFT_VLM, tie_word_embeddings=tied))
    ids_L, embeds_LE = random_prompt(14)
    next_id = 7
    chain = draft.chain(draft.prefill(ids_L, embeds_LE, next_id, runs), 5)
    assert chain.positions == (13, 14, 15, 16, 17)
    tokens = [*ids_L.tolist(), next_id, *chain.token_ids_S.tolist()]
    nothing = torch.zeros(len(tokens) - len(embeds_LE), embeds_LE.shape[1])
    with torch.no_grad():
        states_BLD = draft(torch.tensor([tokens]), torch.cat((embeds_LE, nothing))[None], [runs])
    logits_SV = states_BLD[0, 13:18] @ draft.head_VD.T
    torch.testing.assert_close(chain.logits_SV, logits_SV, atol=1e-5, rtol=1e-4)
    assert torch.equal(chain.token_ids_S, logits_SV.argmax(-1))


@EACH
def test_image_rows_read_the_projector(runs: tuple[tuple[int, int], ...]) -> None:
    draft = random_draft_vlm()
    ids_L, embeds_LE = random_prompt(14)
    prefill = draft.prefill(ids_L, embeds_LE, 7, runs)
    of_image = {index for start, end in runs for index in range(start, end)}
    for row in range(13):
        token = row + 1
        wanted_D = (
            draft.projector(embeds_LE[token])
            if token in of_image
            else draft.embed_tokens.weight[ids_L[token]]
        )
        torch.testing.assert_close(prefill.layer_in_ND[row], wanted_D)
    assert torch.equal(prefill.layer_in_ND[13], draft.embed_tokens.weight[7])


def test_only_images_and_text_ids_are_read() -> None:
    """Neither the first token, nor embeddings of text, nor ids of image tokens change a thing."""
    draft = random_draft_vlm()
    ids_L, embeds_LE = random_prompt(14)
    want = draft.prefill(ids_L, embeds_LE, 7, [(3, 9)]).out_ND
    others_L, others_LE = ids_L.clone(), embeds_LE.clone()
    others_L[0], others_L[3:9] = 63 - ids_L[0], 1
    others_LE[:3], others_LE[9:] = 9.0, 9.0
    assert torch.equal(draft.prefill(others_L, others_LE, 7, [(3, 9)]).out_ND, want)
    others_LE[4] += 1
    assert not torch.equal(draft.prefill(others_L, others_LE, 7, [(3, 9)]).out_ND, want)


def test_padding_and_later_tokens_change_nothing() -> None:
    draft = random_draft_vlm()
    (ids_L, embeds_LE), (long_L, long_LE) = random_prompt(9), random_prompt(15)
    alone_BLD = draft(ids_L[None], embeds_LE[None], [((2, 5),)])
    ids_BL = torch.stack((torch.nn.functional.pad(ids_L, (0, 6)), long_L))
    embeds_BLE = torch.stack((torch.nn.functional.pad(embeds_LE, (0, 0, 0, 6)), long_LE))
    both_BLD = draft(ids_BL, embeds_BLE, [((2, 5),), ((1, 9),)])
    torch.testing.assert_close(both_BLD[:1, :8], alone_BLD[:, :8])


@pytest.mark.parametrize("tied", [False, True])
def test_folders_load_as_what_they_are(tmp_path: Path, tied: bool) -> None:
    config = write_draft_vlm(tmp_path / "vlm", tie_word_embeddings=tied)
    draft = load_draft(tmp_path / "vlm")
    assert isinstance(draft, DraftVlm)
    assert set(draft.state_dict()) == set(tensor_shapes(config))
    wanted = random_draft_vlm(config).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in draft.state_dict().items())
    own = draft.embed_tokens if tied else draft.lm_head
    assert own is not None
    assert draft.output_head(torch.zeros(64, 32)) is own.weight
    some_V = torch.tensor([3, 9, 60])
    assert torch.equal(draft.output_head(torch.zeros(3, 32), some_V), own.weight[some_V])
    write_head(tmp_path / "head")
    assert isinstance(load_draft(tmp_path / "head"), ViSpecDraft)
    with pytest.raises(ViSpecError, match="the head is no draft VLM"):
        DraftVlm(TYPICAL["canonical"])
