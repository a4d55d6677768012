"""Child-process job: engines that start one after another, and how each of them started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.engine.workloads import Request, as_json, drive, image_text, words
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    from vllm import LLM


def serve(kind: str, starts: list[dict[str, Any]], max_tokens: int = 8) -> Iterator[dict[str, Any]]:
    """Start one engine per item of ``starts`` and serve the same requests with each.

    A start has a ``name`` and ``options`` of :class:`engine.EngineOptions`.
    """
    for start in starts:
        options = engine.EngineOptions(**start["options"])
        with engine.engine(options) as llm:
            drafted = watch_drafts(llm)
            results = drive(llm, requests(kind, max_tokens))
            answer = {"name": start["name"], "results": as_json(results), "drafts": drafted}
            yield answer | started(llm)


def watch_drafts(llm: LLM) -> list[list[list[int]]]:
    """Return a list that grows with every round by its drafts, requests by tokens.

    Where a schedule asks for fewer tokens than the engine's most, the rest of them is left over.
    """
    proposer = draft_logits.drafter(llm)
    propose, rounds = proposer.propose, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        rounds.append(drafts[:, : kwargs.get("num_speculative_tokens")].tolist())
        return drafts

    proposer.propose = watched
    return rounds


def requests(kind: str, max_tokens: int) -> list[Request]:
    """Return prompts with no image, one and two; they end at different times."""
    image = image_text(kind, 1)
    return [
        Request("two", f"{image} and {image} {words(1, 9)}", (2, 4), max_tokens),
        Request("one", f"{words(2, 6)} {image} {words(3, 5)}", (3,), max_tokens + 3),
        Request("text", words(4, 12), (), max_tokens - 2),
    ]


def started(llm: LLM) -> dict[str, Any]:
    """Return what shows how an engine was started.

    ``compiled`` names the classes of the modules that were, ``loaded`` those among them that vLLM
    took from its cache.
    """
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper as Compiled

    runner, config = draft_logits.model_runner(llm), llm.llm_engine.vllm_config
    models = [runner.get_model()]
    if config.speculative_config is not None:
        models.append(draft_logits.drafter(llm).model)
    modules = [module for model in models for module in model.modules()]
    wrapped = [module for module in modules if isinstance(module, Compiled)]
    used = [m for m in wrapped if not m.do_not_compile and (m.compiled or _artefact(m))]
    return {
        "compiled": sorted(type(module).__name__ for module in used),
        "loaded": sorted(
            type(module).__name__ for module in used if module.was_aot_compile_fn_loaded_from_disk
        ),
        "dtype": str(config.model_config.dtype),
        "kv_cache_given": config.cache_config.kv_cache_memory_bytes is not None,
        "runner": type(runner).__module__,
    }


def _artefact(module: Any) -> Any:
    return getattr(module, "aot_compiled_fn", None)
