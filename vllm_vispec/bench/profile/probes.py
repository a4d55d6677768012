"""How to look into each model runner. A new one is one `RunnerProbe` in `RUNNERS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.profile import parts
from vllm_vispec.bench.profile.spans import Batch, Prompt, Recorder
from vllm_vispec.utils.errors import ViSpecError

INTERPRETED = "Triton interpreter: host time of kernels, not a GPU's."


@dataclass(frozen=True)
class RunnerProbe:
    """Where a runner does what.

    Attributes:
        name: as in `--runner`.
        drafter: the runner's attribute that drafts.
        sample: the runner's method that verifies and samples; target logits inside count apart.
        draft_sample: the drafter's method that samples; draft logits inside count apart.
        environment: what makes vLLM take this runner.
        on_cpu: what it needs besides where there is no GPU.
        note_on_cpu: what has to be said about its times there; "" if nothing.
    """

    name: str
    drafter: str
    sample: str
    draft_sample: str
    environment: Mapping[str, str]
    on_cpu: Mapping[str, str]
    note_on_cpu: str = ""

    def install(self, recorder: Recorder, llm: Any) -> None:
        """Record what an engine in this process does, from now on.

        Args:
            llm: a `vllm.LLM`.

        Raises:
            ViSpecError: the engine has another runner, more than one process, or is not split
                where this version of the package expects it.
        """
        runner = _model_runner(llm)
        drafter = getattr(runner, self.drafter, None)
        if drafter is None:
            raise ViSpecError(
                f"--runner {self.name}: vLLM started another model runner for this target; choose "
                "the other one"
            )
        recorder.wrap(llm.llm_engine, "step", parts.ROUND)
        recorder.wrap(runner, "execute_model", parts.EXECUTE, batch_of)
        recorder.wrap(runner, self.sample, parts.SAMPLE)
        recorder.wrap(drafter, "propose", parts.PROPOSE)
        recorder.wrap(drafter, self.draft_sample, parts.DRAFT_SAMPLE)
        _watch_target(recorder, runner.get_model())
        _watch_draft(recorder, drafter)


def _watch_target(recorder: Recorder, model: Any) -> None:
    recorder.hook(model, parts.TARGET_MODEL)
    recorder.wrap(model, "compute_logits", parts.TARGET_LOGITS)
    if hasattr(model, "embed_multimodal"):
        recorder.wrap(model, "embed_multimodal", parts.VISION)


def _watch_draft(recorder: Recorder, drafter: Any) -> None:
    model = drafter.model
    recorder.hook(model, parts.DRAFT_MODEL)
    recorder.wrap(model, "compute_logits", parts.DRAFT_LOGITS)
    if hasattr(model, "get_top_tokens"):
        # With use_local_argmax_reduction the draft is asked for tokens instead of logits.
        recorder.wrap(model, "get_top_tokens", parts.DRAFT_LOGITS)
    # Only a ViSpec draft has these; a head without compression lacks the adaptor.
    ours = {
        parts.ROWS: getattr(drafter, "draft_rows", None),
        parts.ADAPTOR: getattr(getattr(model, "model", None), "adaptor", None),
    }
    for name, owner in ours.items():
        for method in _own_methods(owner):
            recorder.wrap(owner, method, name)


def _own_methods(owner: object | None) -> list[str]:
    """Public methods that the object's own class defines."""
    found = () if owner is None else vars(type(owner)).items()
    return [name for name, value in found if not name.startswith("_") and callable(value)]


def _model_runner(llm: Any) -> Any:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
    runner = getattr(getattr(worker, "worker", worker), "model_runner", None)
    if runner is None:
        raise ViSpecError(
            "--serve: the engine has more than one process; a profile needs one, so leave "
            "parallelism and --distributed-executor-backend out"
        )
    return runner


def batch_of(scheduler_output: Any, *_: Any, **__: Any) -> Batch:
    """Return what vLLM's scheduler has put together for a step."""
    scheduled: Mapping[str, int] = scheduler_output.num_scheduled_tokens
    drafts = scheduler_output.scheduled_spec_decode_tokens
    return Batch(
        tuple(scheduled.values()),
        tuple(len(drafts.get(request, ())) for request in scheduled),
        tuple(_prompt(request) for request in scheduler_output.scheduled_new_reqs),
    )


def _prompt(request: Any) -> Prompt:
    return Prompt(
        tokens=len(request.prompt_token_ids or ()),
        computed=request.num_computed_tokens,
        image_tokens=sum(
            feature.mm_position.get_num_embeds() for feature in request.mm_features or ()
        ),
    )


RUNNERS: Mapping[str, RunnerProbe] = MappingProxyType(
    {
        probe.name: probe
        for probe in (
            RunnerProbe(
                "v1",
                drafter="drafter",
                sample="_sample",
                draft_sample="_sample_draft_tokens",
                environment=MappingProxyType({"VLLM_USE_V2_MODEL_RUNNER": "0"}),
                on_cpu=MappingProxyType({}),
            ),
            RunnerProbe(
                "v2",
                drafter="speculator",
                sample="sample",
                draft_sample="sample_draft",
                environment=MappingProxyType({"VLLM_USE_V2_MODEL_RUNNER": "1"}),
                on_cpu=MappingProxyType({"TRITON_INTERPRET": "1"}),
                note_on_cpu=INTERPRETED,
            ),
        )
    }
)


def find_runner(name: str) -> RunnerProbe:
    """Return a runner's probe.

    Raises:
        ViSpecError: there is none.
    """
    if name not in RUNNERS:
        raise ViSpecError(f"--runner {name} is unknown: choose from {', '.join(RUNNERS)}")
    return RUNNERS[name]
