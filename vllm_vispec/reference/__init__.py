"""Drafts in pure PyTorch: parity tests, training, experiments."""

from vllm_vispec.compressors.reference_gate import Decision, KeyBias, decide
from vllm_vispec.reference.base import Draft
from vllm_vispec.reference.draft_vlm import DraftVlm, VlmPrefill, image_mask
from vllm_vispec.reference.load import draft_class, load_draft
from vllm_vispec.reference.masked import MaskedRows, attention_mask, masked_rows
from vllm_vispec.reference.model import ViSpecDraft
from vllm_vispec.reference.rows import RowPlan, merge_runs, plan_rows
from vllm_vispec.reference.states import Chain, Prefill

__all__ = [
    "Chain",
    "Decision",
    "Draft",
    "DraftVlm",
    "KeyBias",
    "MaskedRows",
    "Prefill",
    "RowPlan",
    "ViSpecDraft",
    "VlmPrefill",
    "attention_mask",
    "decide",
    "draft_class",
    "image_mask",
    "load_draft",
    "masked_rows",
    "merge_runs",
    "plan_rows",
]
