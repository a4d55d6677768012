"""Jobs that serve golden cases in a child process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.support import engine, golden, head_padding
from tests.support.compressor_heads import with_compressor


def serve_cases(
    cases_dir: str, work_dir: str, speculative: bool = True
) -> Iterator[dict[str, Any]]:
    """Serve every case below ``cases_dir`` and yield each :class:`engine.Completion` as JSON data.

    One engine per (target, draft, K) pair; the cases of a pair run one after another, so that their
    rounds are those of a single request. A case or pair that fails yields its ``error``.
    """
    head_padding.install()
    ordered = sorted(golden.load_cases(Path(cases_dir)), key=lambda case: (case.pair, case.name))
    for (target, draft, drafts), group in groupby(ordered, key=lambda case: case.pair):
        cases = list(group)
        model = golden.materialise_target(target, Path(work_dir) / target.name)
        options = engine.EngineOptions(
            model=str(model),
            draft=str(draft) if speculative else None,
            num_draft_tokens=drafts,
            prefix_caching=False,
            enable_mm_embeds=True,
        )
        yield from _serve_pair(options, cases, model)


def serve_tree_cases(cases_dir: str, work_dir: str) -> Iterator[dict[str, Any]]:
    """Serve every case with the recorded trees, as :func:`serve_cases` does with chains.

    The targets' heads are padded for the trees' codes to a size that the CPU serves.
    """
    head_padding.allow_unequal_llava_next_embeds()
    ordered = sorted(golden.load_cases(Path(cases_dir)), key=lambda case: (case.pair, case.name))
    for (target, draft, _), group in groupby(ordered, key=lambda case: case.pair):
        model = golden.materialise_target(target, Path(work_dir) / target.name)
        options = engine.EngineOptions(
            model=str(model),
            draft=str(draft),
            num_draft_tokens=golden.TREE_NODES,
            tree=golden.TREE,
            prefix_caching=False,
            enable_mm_embeds=True,
        )
        yield from _serve_pair(options, list(group), model)


def serve_compressors(
    cases_dir: str, work_dir: str, compressors: list[list[str]]
) -> Iterator[dict[str, Any]]:
    """Serve the cases of every target with heads made of its draft, one compressor after another.

    ``compressors`` has a list for each target; targets are taken by name. Yields as
    :func:`serve_cases`, and the ``compressor``.
    """
    head_padding.install()
    cases = sorted(golden.load_cases(Path(cases_dir)), key=lambda case: str(case.target_dir))
    groups = groupby(cases, key=lambda case: case.target_dir)
    for (target, group), texts in zip(groups, compressors, strict=True):
        own = list(group)
        model = golden.materialise_target(target, Path(work_dir) / target.name)
        for index, text in enumerate(texts):
            head = Path(work_dir) / f"{target.name}-head-{index}"
            options = engine.EngineOptions(
                model=str(model),
                draft=str(with_compressor(own[0].draft_dir, head, text)),
                prefix_caching=False,
                enable_mm_embeds=True,
            )
            for item in _serve_pair(options, own, model):
                yield item | {"compressor": text}


def _serve_pair(
    options: engine.EngineOptions, cases: list[golden.GoldenCase], model: Path
) -> Iterator[dict[str, Any]]:
    pending = [case.name for case in cases]
    try:
        with engine.engine(options) as llm:
            for case in cases:
                params = engine.greedy(len(case.greedy_ids))
                found = engine.generate(llm, [golden.engine_prompt(case, model)], params)[0]
                yield {"name": pending.pop(0)} | found.to_json()
    except Exception as error:
        yield from ({"name": name, "error": repr(error)} for name in pending)
