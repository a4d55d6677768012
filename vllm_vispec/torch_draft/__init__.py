"""The ViSpec draft in pure PyTorch: parity tests, training, experiments."""

from vllm_vispec.torch_draft.masked import attention_mask, masked_rows
from vllm_vispec.torch_draft.model import Chain, Prefill, ViSpecDraft
from vllm_vispec.torch_draft.rows import RowPlan, merge_runs, plan_rows

__all__ = [
    "Chain",
    "Prefill",
    "RowPlan",
    "ViSpecDraft",
    "attention_mask",
    "masked_rows",
    "merge_runs",
    "plan_rows",
]
