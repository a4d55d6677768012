"""How foreign ViSpec heads are read. Importing this package registers every dialect."""

from vllm_vispec.heads.formats.automodel import AUTOMODEL
from vllm_vispec.heads.formats.base import DIALECTS, Dialect, get_dialect, register_dialect
from vllm_vispec.heads.formats.canonical import CANONICAL
from vllm_vispec.heads.formats.reference import REFERENCE
from vllm_vispec.heads.load import (
    HeadInfo,
    inspect_head,
    is_vispec_head,
    iter_canonical_tensors,
    resolve_head,
)
from vllm_vispec.heads.target import check_against_target

# Detection asks in this order: the most explicit layout first.
for _dialect in (CANONICAL, AUTOMODEL, REFERENCE):
    register_dialect(_dialect)

__all__ = [
    "DIALECTS",
    "Dialect",
    "HeadInfo",
    "check_against_target",
    "get_dialect",
    "inspect_head",
    "is_vispec_head",
    "iter_canonical_tensors",
    "register_dialect",
    "resolve_head",
]
