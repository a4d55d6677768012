"""The pure-PyTorch draft against tensors recorded from the reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.golden import GoldenCase, load_cases
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.reference import Prefill

pytestmark = pytest.mark.golden
every_case = pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.name)

HIDDEN_TOLERANCE = 2e-5
LOGITS_TOLERANCE = 1e-4


def prefill(case: GoldenCase, draft: Any) -> Prefill:
    """Run the draft over the recorded prompt."""
    names = ("inputs_embeds", "draft_last_embed", "target_hidden_states")
    with torch.no_grad():
        state: Prefill = draft.prefill(*(case.tensors[name] for name in names), case.image_runs)
    return state


def assert_close(found: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert found.shape == want.shape
    torch.testing.assert_close(found, want, atol=tolerance, rtol=0)


@every_case
def test_prefill(case: GoldenCase) -> None:
    want, found = case.tensors, prefill(case, load_draft(case.draft_dir))
    assert found.plan.positions == tuple(want["compact_position_ids"].tolist())
    is_image = [token >= 0 for token in found.plan.token_of_row]
    assert is_image == want["compact_is_image"].tolist()
    assert found.plan.run_of_row == tuple(want["compact_global_index"].tolist())
    assert len(found.plan.positions) == case.meta["compact_len"]
    if "adaptor_output" in want:
        assert_close(found.adaptor_RQD, want["adaptor_output"], HIDDEN_TOLERANCE)
    assert_close(found.global_D, want["global_feature"], HIDDEN_TOLERANCE)
    assert_close(found.layer_in_ND, want["compact_layer_in"], HIDDEN_TOLERANCE)
    assert_close(found.out_ND, want["compact_layer_out"], HIDDEN_TOLERANCE)
    for cached, key in zip(found.cache, ("draft_prefill_k", "draft_prefill_v"), strict=True):
        assert_close(cached[0], want[key], HIDDEN_TOLERANCE)


@every_case
def test_chain(case: GoldenCase) -> None:
    want, draft = case.tensors, load_draft(case.draft_dir)
    weights = load_file(case.target_dir / "model.safetensors")
    (lm_head,) = (tensor for name, tensor in weights.items() if name.endswith("lm_head.weight"))
    found = draft.chain(prefill(case, draft), len(want["chain_token_ids"]), lm_head.float())
    assert found.positions == tuple(want["chain_position_ids"].tolist())
    assert_close(found.layer_in_SD, want["chain_layer_in"], HIDDEN_TOLERANCE)
    assert_close(found.hidden_SD, want["chain_hidden"], HIDDEN_TOLERANCE)
    assert_close(found.logits_SV, want["chain_logits"], LOGITS_TOLERANCE)
    assert found.token_ids_S.tolist() == want["chain_token_ids"].tolist()


@every_case
def test_steps(case: GoldenCase) -> None:
    """Catch-up rows and draft-on-draft steps over the recorded ones."""
    draft = load_draft(case.draft_dir)
    state = prefill(case, draft)
    stable, working = state.cache, state.cache
    for call in case.meta["chainspec"]["trace"]:
        if f"trace.{call['call']}.out" not in case.tensors or call["kind"] == "prefill":
            continue
        hidden_in, wanted_in, wanted = (
            case.tensors[f"trace.{call['call']}.{name}"]
            for name in ("hidden_in", "layer_in", "out")
        )
        before = stable if call["kind"] == "catchup" else working
        assert before[0].shape[2] == call["kv_len_before"]
        assert draft.embed_tokens is not None
        with torch.no_grad():
            embeds = draft.embed_tokens(torch.tensor(call["token_ids"]))
            out, layer_in, working = draft.extend(
                embeds, hidden_in, state.global_D, call["position_ids"][0], before
            )
        if call["kind"] == "catchup":
            stable = working
        assert_close(layer_in, wanted_in, HIDDEN_TOLERANCE)
        assert_close(out, wanted, HIDDEN_TOLERANCE)
