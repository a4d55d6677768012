"""The sections of a report in the order in which they are shown. A new one is listed here."""

from vllm_vispec.bench.report.sections.acceptance import ACCEPTANCE
from vllm_vispec.bench.report.sections.answer import ANSWER
from vllm_vispec.bench.report.sections.axes import CONCURRENCY, IMAGE_TOKENS, TEMPERATURE, K
from vllm_vispec.bench.report.sections.base import Section
from vllm_vispec.bench.report.sections.cells import COSTS, FAILURES, SPEED
from vllm_vispec.bench.report.sections.conditions import COMMANDS, DEFINITIONS, ENVIRONMENT
from vllm_vispec.bench.report.sections.losses import LOSSES
from vllm_vispec.bench.report.sections.tasks import TASKS

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        ANSWER,
        ENVIRONMENT,
        CONCURRENCY,
        IMAGE_TOKENS,
        K,
        TEMPERATURE,
        ACCEPTANCE,
        TASKS,
        LOSSES,
        FAILURES,
        SPEED,
        COSTS,
        DEFINITIONS,
        COMMANDS,
    )
}

__all__ = ["SECTIONS", "Section"]
