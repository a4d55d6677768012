"""Heads without compression or global feature: what they consist of and what they compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.heads import TYPICAL, random_tensors, write_head
from vllm_vispec.heads.folder import inspect_head, load_draft
from vllm_vispec.reference import ViSpecDraft, tensor_shapes
from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun, RequestLayout
from vllm_vispec.spec_decode.step import RowIds, write_text_row_ids

KINDS = [(True, True), (True, False), (False, True), (False, False)]
EACH_KIND = pytest.mark.parametrize(("compress", "global_feature"), KINDS)


@EACH_KIND
def test_tensors_of_a_kind(tmp_path: Path, compress: bool, global_feature: bool) -> None:
    flags = {"compress": compress, "global_feature": global_feature}
    head = write_head(tmp_path, "canonical", **flags)
    names = tensor_shapes(head)
    assert any(name.startswith("img_adaptor.") for name in names) == head.has_adaptor
    assert any(name.startswith("img_fc.") for name in names) == head.global_feature
    assert head.has_adaptor == (compress or global_feature)
    assert head.global_feature == global_feature
    assert set(ViSpecDraft(head).state_dict()) == set(names)
    assert inspect_head(tmp_path).config == head
    load_draft(tmp_path)


@pytest.mark.parametrize("global_feature", [True, False])
def test_without_compression_image_rows_read_their_embeddings(global_feature: bool) -> None:
    head = replace(TYPICAL["canonical"], compress=False, global_feature=global_feature)
    draft = ViSpecDraft(head)
    draft.load_state_dict(random_tensors(head))
    embeds, hidden = torch.randn(9, 32), torch.randn(9, 32)
    with torch.no_grad():
        state = draft.prefill(embeds, torch.randn(32), hidden, [(2, 6)])
        early = draft.layer_input(embeds[1:6], hidden[:5], torch.zeros(32))
    assert state.plan.positions == tuple(range(9))
    assert torch.allclose(state.layer_in_ND[:5], early, atol=1e-6)
    with torch.no_grad():
        late = draft.layer_input(embeds[6:], hidden[5:8], state.global_D)
    assert torch.allclose(state.layer_in_ND[5:8], late, atol=1e-6)
    assert bool(state.global_D.any()) == global_feature


def layout_of(*spans: tuple[int, int]) -> RequestLayout:
    parts = [(FeatureSlice(str(i), 0, b - a),) for i, (a, b) in enumerate(spans)]
    return RequestLayout(
        tuple(ImageRun(a, b, part) for (a, b), part in zip(spans, parts, strict=True))
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_text_row_ids_follow_the_last_image_that_ended(size: int) -> None:
    """However the rows are cut, each gets the image behind which it stands."""
    spans = [(0, 3), (5, 9), (9, 11), (20, 30)]
    layout, ids = layout_of(*spans), RowIds(num_slots=9, num_query_tokens=3)
    asked: list[ImageRun] = []

    def slot_of(run: ImageRun) -> int:
        asked.append(run)
        return layout.runs.index(run) + 1

    found = np.full(40, -1, dtype=np.int32)
    for first in range(0, 40, size):
        asked.clear()
        write_text_row_ids(layout, ids, slot_of, first, found[first : first + size])
        # Embeddings of a run may be incomplete before its last token is at hand.
        assert all(run.text_row < first + size for run in asked)
    for row in range(40):
        ended = [index for index, (_, end) in enumerate(spans) if end - 1 <= row]
        assert found[row] == ids.text(ended[-1] + 1 if ended else 0), row
