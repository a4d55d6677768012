"""Drafts in plain PyTorch: the readable definition, what parity tests compare with and what trains.

* `modeling_vispec`: a head on the target's hidden states; `modeling_draft_vlm`: a draft VLM.
* `rows`: which rows a prompt needs; `masked_rows`: the same for whole batches in training.
* `build`: the draft of a configuration, and the tensors it consists of.

Heads are read and written in `vllm_vispec.heads`, which may import this room; this room imports
`vllm_vispec.heads.config` only.
"""

from vllm_vispec.compressors.turns import Decision, KeyBias, decide
from vllm_vispec.reference.build import draft_class, tensor_shapes
from vllm_vispec.reference.draft import Chain, Draft
from vllm_vispec.reference.masked_rows import MaskedRows, attention_mask, masked_rows
from vllm_vispec.reference.modeling_draft_vlm import DraftVlm, VlmPrefill, image_mask
from vllm_vispec.reference.modeling_vispec import Prefill, ViSpecDraft
from vllm_vispec.reference.rows import RowPlan, merge_runs, plan_rows

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
    "masked_rows",
    "merge_runs",
    "plan_rows",
    "tensor_shapes",
]
