"""The sides that are compared: how each is served. A new one is one `Side` in `SIDES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.heads import plain_eagle_head, zeroed_head
from vllm_vispec.bench.schedules import K_SETTING, SETTING, Ranges, speculative_config
from vllm_vispec.utils.errors import ViSpecError

NGRAM_LONGEST, NGRAM_SHORTEST = 4, 2
"""vLLM's lookup looks for the longest repeated n-gram between these lengths."""
NO_DRAFT = {K_SETTING: 1, SETTING: [[1, 1, 0]]}
"""K = 0 as vLLM takes it: the draft is loaded and kept up, and proposes nothing."""


@dataclass(frozen=True)
class Heads:
    """What the sides draft with; hub ids stay as they are.

    Attributes:
        target: folder or hub id.
        head: ViSpec head, "" if there is none.
        eagle_head: head of the side "eagle", "" if there is none.
        folder: where heads that are made for a run lie.
        schedule: K by batch size of the side "vispec_tuned", empty if there is none.
    """

    target: str
    head: str
    eagle_head: str
    folder: Path
    schedule: Ranges = ()


@dataclass(frozen=True)
class Side:
    """One way to serve the target.

    Attributes:
        name: as in `CellKey.side`.
        summary: what a report says about it.
        needs: options without which it cannot be served.
        draft: makes what goes into vLLM's speculative config besides K; None: no speculation. A
            side that chooses K itself puts it there too.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    draft: Callable[[Heads], Mapping[str, Any]] | None

    def speculative_config(self, heads: Heads, num_tokens: int) -> dict[str, Any] | None:
        """Return vLLM's speculative config for this side, None without speculation.

        Args:
            num_tokens: K; 0 keeps the draft up without proposing anything.

        Raises:
            ViSpecError: the side's head cannot be used.
        """
        if self.draft is None:
            return None
        draft = self.draft(heads)
        if K_SETTING in draft:
            return dict(draft)
        return {**draft, **({K_SETTING: num_tokens} if num_tokens else NO_DRAFT)}


def _ngram(heads: Heads) -> Mapping[str, Any]:
    return {
        "method": "ngram",
        "prompt_lookup_max": NGRAM_LONGEST,
        "prompt_lookup_min": NGRAM_SHORTEST,
    }


def _eagle(heads: Heads) -> Mapping[str, Any]:
    head = plain_eagle_head(heads.eagle_head, heads.target, heads.folder / "eagle")
    return {"method": "eagle", "model": head}


def _vispec_zeroed(heads: Heads) -> Mapping[str, Any]:
    return {"method": "vispec", "model": zeroed_head(heads.head, heads.folder / "vispec_zeroed")}


def _vispec(heads: Heads) -> Mapping[str, Any]:
    return {"method": "vispec", "model": heads.head}


def _vispec_tuned(heads: Heads) -> Mapping[str, Any]:
    return speculative_config(_vispec(heads), heads.schedule) or {}


SIDES: Mapping[str, Side] = MappingProxyType(
    {
        side.name: side
        for side in (
            Side("plain", "vLLM without speculation", (), None),
            Side(
                "ngram",
                "vLLM's n-gram lookup in the prompt and the answer; rounds in which it finds "
                "nothing are not counted",
                (),
                _ngram,
            ),
            Side("eagle", "vLLM's EAGLE with a text-trained head", ("--eagle-head",), _eagle),
            Side(
                "vispec_zeroed",
                "ViSpec whose vision adaptor puts out zeros",
                ("--head",),
                _vispec_zeroed,
            ),
            Side("vispec", "ViSpec", ("--head",), _vispec),
            Side(
                "vispec_tuned",
                "ViSpec with K by the number of running requests",
                ("--head", "--schedule"),
                _vispec_tuned,
            ),
        )
    }
)


def check_sides(names: Sequence[str], options: Mapping[str, object]) -> None:
    """Refuse sides that are unknown or lack what they draft with.

    Args:
        options: value of every option that a side may need.

    Raises:
        ViSpecError: names the side and what is possible.
    """
    for name in names:
        if name not in SIDES:
            raise ViSpecError(f"--sides: {name} is unknown: choose from {', '.join(SIDES)}")
        for option in SIDES[name].needs:
            if not options.get(option):
                raise ViSpecError(f"--sides: {name} needs {option}: give it, or leave the side out")
