"""The pure-PyTorch draft against tensors recorded from the reference implementation."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_vispec.heads.folder import load_draft
from vllm_vispec.reference import Prefill

DEFAULT_FOLDER = Path(__file__).parents[1] / "golden_cases"
GOLDEN = Path(os.environ.get("VISPEC_GOLDEN_DIR") or DEFAULT_FOLDER)
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))

pytestmark = pytest.mark.golden

HIDDEN_TOLERANCE = 2e-5
LOGITS_TOLERANCE = 1e-4


class Case:
    """One recorded case with the draft run over it."""

    def __init__(self, name: str) -> None:
        self.meta: dict[str, Any] = json.loads((GOLDEN / name / "case.json").read_text())
        self.want = load_file(GOLDEN / name / "tensors.safetensors")
        self.draft = load_draft(GOLDEN / self.meta["draft"])
        self.runs = [(a, b) for a, b in self.meta["image_runs_in_prompt"]]
        self.lm_head = _lm_head(GOLDEN / self.meta["target"])

    def prefill(self) -> Prefill:
        with torch.no_grad():
            return self.draft.prefill(
                self.want["inputs_embeds"],
                self.want["draft_last_embed"],
                self.want["target_hidden_states"],
                self.runs,
            )


@cache
def _case(name: str) -> Case:
    return Case(name)


def _lm_head(folder: Path) -> torch.Tensor:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name.endswith("lm_head.weight"):
                    return weights.get_tensor(name).float()
    raise AssertionError(f"no lm_head in {folder}")


def assert_close(found: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert found.shape == want.shape
    torch.testing.assert_close(found, want, atol=tolerance, rtol=0)


def test_golden_folder_has_cases() -> None:
    assert CASES, f"no */case.json in {GOLDEN}: set VISPEC_GOLDEN_DIR to a folder of cases"


@pytest.mark.parametrize("name", CASES)
def test_golden_torch_parity_prefill(name: str) -> None:
    case = _case(name)
    want, found = case.want, case.prefill()
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


@pytest.mark.parametrize("name", CASES)
def test_golden_torch_parity_chain(name: str) -> None:
    case = _case(name)
    want = case.want
    found = case.draft.chain(case.prefill(), len(want["chain_token_ids"]), case.lm_head)
    assert found.positions == tuple(want["chain_position_ids"].tolist())
    assert_close(found.layer_in_SD, want["chain_layer_in"], HIDDEN_TOLERANCE)
    assert_close(found.hidden_SD, want["chain_hidden"], HIDDEN_TOLERANCE)
    assert_close(found.logits_SV, want["chain_logits"], LOGITS_TOLERANCE)
    assert found.token_ids_S.tolist() == want["chain_token_ids"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_golden_torch_parity_decode_rounds(name: str) -> None:
    """Catch-up rows and draft-on-draft steps over the recorded rounds."""
    case = _case(name)
    state = case.prefill()
    stable, working = state.cache, state.cache
    for call in case.meta["chainspec"]["trace"]:
        if f"trace.{call['call']}.out" not in case.want or call["kind"] == "prefill":
            continue
        want = {k: case.want[f"trace.{call['call']}.{k}"] for k in ("hidden_in", "layer_in", "out")}
        before = stable if call["kind"] == "catchup" else working
        assert before[0].shape[2] == call["kv_len_before"]
        assert case.draft.embed_tokens is not None
        with torch.no_grad():
            embeds = case.draft.embed_tokens(torch.tensor(call["token_ids"]))
            out, layer_in, working = case.draft.extend(
                embeds, want["hidden_in"], state.global_D, call["position_ids"][0], before
            )
        if call["kind"] == "catchup":
            stable = working
        assert_close(layer_in, want["layer_in"], HIDDEN_TOLERANCE)
        assert_close(out, want["out"], HIDDEN_TOLERANCE)
