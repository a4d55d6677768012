"""A folder of tiny targets and heads, each built once per test session."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.draft_vlm_heads import DraftVlmSpec, build_draft_vlm
from tests.support.tiny_configs import HEADS
from tests.support.tiny_heads import HeadSpec, build_head
from tests.support.tiny_models import build_target


@dataclass(frozen=True)
class TinyStore:
    """Builds on first use below ``root``; safe to share between tests and child processes."""

    root: Path

    def target(self, kind: str, seed: int = 0) -> Path:
        """Return the folder of the tiny target of family ``kind``."""
        return build_target(kind, self.root / f"{kind}-{seed}", seed)

    def head(self, spec: HeadSpec, target_seed: int = 0) -> Path:
        """Return the folder of the head ``spec`` for the target of the same family."""
        parts = (spec.kind, spec.dialect, spec.num_q, spec.qkv_bias, spec.noise, spec.seed)
        flags: tuple[object, ...] = (
            spec.compress,
            spec.global_feature,
            re.sub(r"\W+", "_", spec.compressor),
        )
        if spec.kv_heads != HEADS:
            flags = (*flags, f"kv{spec.kv_heads}")
        name = "head-" + "-".join(str(part) for part in (*parts, *flags, target_seed))
        return build_head(spec, self.target(spec.kind, target_seed), self.root / name)

    def pair(self, kind: str, **changes: object) -> tuple[str, str]:
        """Return target and head folders as strings, ready for :class:`EngineOptions`."""
        spec = replace(HeadSpec(kind), **changes)  # type: ignore[arg-type]
        return str(self.target(kind)), str(self.head(spec))

    def draft_vlm(self, kind: str, **changes: object) -> tuple[str, str]:
        """Return the folders of a target and of a draft VLM for it, as strings."""
        spec = replace(DraftVlmSpec(kind), **changes)  # type: ignore[arg-type]
        target = self.target(kind)
        return str(target), str(build_draft_vlm(spec, target, self.root / spec.name))
