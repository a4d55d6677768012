"""A folder of tiny targets and heads, each built once per test session."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.tiny_heads import DraftVlmSpec, HeadSpec, build_draft_vlm, build_head
from tests.support.tiny_models import build_target

KIND = "qwen2_5_vl"
"""The family of most tests."""
GATED: dict[str, Any] = {
    "compressor": "select(prune:2,pool:4,text_only)",
    "num_q": 1,
    "checkpoint_format": "canonical",
}
UNCOMPRESSED: dict[str, Any] = {"compress": False, "checkpoint_format": "canonical"}
"""What makes a head of :class:`TinyStore` a gated one, or one without compression."""


@dataclass(frozen=True)
class TinyStore:
    """Builds on first use below ``root``; safe to share between tests and child processes."""

    root: Path

    def target(self, kind: str = KIND, seed: int = 0) -> Path:
        """Return the folder of the tiny target of family ``kind``."""
        return build_target(kind, self.root / f"{kind}-{seed}", seed)

    def head(self, kind: str = KIND, **changes: Any) -> str:
        """Return the folder of a head for that target; ``changes`` go to its ``HeadSpec``."""
        spec = replace(HeadSpec(kind), **changes)
        return str(build_head(spec, self.target(kind), self.root / _name("head", spec)))

    def draft_vlm(self, kind: str = KIND, **changes: Any) -> str:
        """Return the folder of a draft VLM; ``changes`` go to its ``DraftVlmSpec``."""
        spec = replace(DraftVlmSpec(kind), **changes)
        return str(build_draft_vlm(spec, self.target(kind), self.root / _name("draft-vlm", spec)))


def _name(what: str, spec: HeadSpec | DraftVlmSpec) -> str:
    return "-".join([what, *(re.sub(r"\W+", "_", str(value)) for value in vars(spec).values())])
