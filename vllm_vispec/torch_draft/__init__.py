"""The ViSpec draft in pure PyTorch: parity tests, training, experiments."""

from vllm_vispec.torch_draft.gating import Decision, KeyBias, decide
from vllm_vispec.torch_draft.masked import MaskedRows, attention_mask, masked_rows
from vllm_vispec.torch_draft.model import ViSpecDraft
from vllm_vispec.torch_draft.rows import RowPlan, merge_runs, plan_rows
from vllm_vispec.torch_draft.states import Chain, Prefill

__all__ = [
    "Chain",
    "Decision",
    "KeyBias",
    "MaskedRows",
    "Prefill",
    "RowPlan",
    "ViSpecDraft",
    "attention_mask",
    "decide",
    "masked_rows",
    "merge_runs",
    "plan_rows",
]
