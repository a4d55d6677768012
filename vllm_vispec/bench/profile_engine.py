"""The engine of one side of a profile: a child process that answers when asked.

The engine lives in the child's own process, where it can be looked into, and works only while it
is asked, so that two of them can wait beside each other.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from vllm_vispec.bench import profile_steps as spans
from vllm_vispec.bench.load import chat_messages
from vllm_vispec.bench.machine import has_gpu, server_environment
from vllm_vispec.bench.profile_steps import CLOCKS, Batch, Clock, Recorder, Steps, find_steps
from vllm_vispec.bench.schema import BenchSample, Record
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.process import WorkerProcess, serve_requests

if TYPE_CHECKING:
    from vllm_vispec.compat.patch_point import Runner

START_S = 1800.0
FIRST_ARGS = (
    # Inside of a graph nothing can be timed.
    "--enforce-eager",
    # A repeated request has to be the same work.
    "--no-enable-prefix-caching",
    "--mm-processor-cache-gb=0",
    "--no-async-scheduling",
    # As in `vllm.LLM`.
    "--disable-log-stats",
)
"""vLLM's options unless the user says otherwise."""


class RunnerProbe(NamedTuple):
    """Where a model runner does what.

    Attributes:
        drafter: the runner's attribute that drafts.
        sample: the runner's method that verifies and samples; target logits inside count apart.
        draft_sample: the drafter's method that samples; draft logits inside count apart.
    """

    drafter: str
    sample: str
    draft_sample: str


RUNNERS: Mapping[str, RunnerProbe] = {
    "v1": RunnerProbe("drafter", "_sample", "_sample_draft_tokens"),
    "v2": RunnerProbe("speculator", "sample", "sample_draft"),
}


def default_runner() -> Literal["v1", "v2"]:
    """Return the runner that vLLM takes on this machine."""
    return "v2" if has_gpu() else "v1"


@dataclass(frozen=True)
class Job(Record):
    """One side's engine.

    Attributes:
        serve_args: vLLM's options.
        speculative_config: vLLM's, with method, model and K.
        runner: a name in `RUNNERS`.
        clock: a name in `CLOCKS`.
        concurrency: requests of a full decoding step.
    """

    target: str
    serve_args: tuple[str, ...]
    speculative_config: dict[str, Any]
    runner: str
    clock: Clock
    concurrency: int

    def environment(self) -> dict[str, str]:
        """Return the engine's environment: a server's, and what the profile is about."""
        found = server_environment() | {
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": str(int(self.runner == "v2")),
        }
        if self.runner == "v2" and not has_gpu():
            found["TRITON_INTERPRET"] = "1"
        if self.clock == "cpu":
            # This clock counts one thread, so the work has to be on it.
            found["OMP_NUM_THREADS"] = "1"
        return found


class EngineProcess(WorkerProcess):
    """A context manager around one engine.

    Args:
        side: its name.
        job: what to start.
        log_file: gets everything that the engine prints.
    """

    def __init__(self, side: str, job: Job, log_file: Path) -> None:
        super().__init__(side, "vllm_vispec.bench.profile_engine", job.environment(), log_file)
        self.job = job

    def begin(self) -> None:
        """Start the engine.

        Raises:
            ViSpecError: it does not start.
        """
        self.request(self.job.to_json(), START_S)

    def record(self, samples: Sequence[BenchSample]) -> Steps:
        """Have samples answered together, with empty caches; returns the steps that it took.

        Raises:
            ViSpecError: an image cannot be read, or the engine fails.
        """
        return Steps.from_json(self._chat(samples)["steps"])

    def answer(self, sample: BenchSample) -> str:
        """Return the greedy answer to one sample.

        Raises:
            ViSpecError: see `record`.
        """
        return str(self._chat([sample])["texts"][0])

    def _chat(self, samples: Sequence[BenchSample]) -> dict[str, Any]:
        messages = [chat_messages(sample) for sample in samples]
        limits = [sample.max_tokens for sample in samples]
        return self.request({"messages": messages, "max_tokens": limits})


class ProfiledEngine:
    """In the child: a `vllm.LLM` whose steps are recorded."""

    def __init__(self, job: Job) -> None:
        from vllm_vispec.compat.check import require
        from vllm_vispec.compat.groups import groups_named
        from vllm_vispec.plugin import register

        for group in groups_named("profile", cast("Runner", job.runner)):
            require(group)
        register()
        self.job, self.llm, self.recorder = job, make_llm(job), Recorder(CLOCKS[job.clock])
        install(self.recorder, self.llm, job.runner)

    def chat(self, messages: Sequence[Any], max_tokens: Sequence[int]) -> dict[str, Any]:
        """Answer requests together and greedily; returns their texts and their `Steps`."""
        from vllm import SamplingParams

        # The vision tower and the adaptor are to run again for images that were seen before.
        for name in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
            getattr(self.llm.llm_engine, name)()
        self.recorder.take()
        params = [SamplingParams(temperature=0.0, max_tokens=limit) for limit in max_tokens]
        outputs = self.llm.chat(messages, params, use_tqdm=False)
        drafts = self.job.speculative_config["num_speculative_tokens"]
        steps = find_steps(self.recorder.take(), drafts, self.job.concurrency)
        return {"texts": [one.outputs[0].text for one in outputs], "steps": steps.to_json()}


def make_llm(job: Job) -> Any:
    """Return a `vllm.LLM`.

    Raises:
        ViSpecError: vLLM does not know an option.
    """
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    # What makes the sides and the target stands last: it is not for the user to say.
    ours = ("--model", job.target, "--speculative-config", json.dumps(job.speculative_config))
    try:
        given = parser.parse_args([*FIRST_ARGS, *job.serve_args, *ours])
    except SystemExit as error:
        raise ViSpecError(
            f"--serve {' '.join(job.serve_args)}: an engine of vLLM does not take these options"
        ) from error
    return LLM.from_engine_args(EngineArgs.from_cli_args(given))


def install(recorder: Recorder, llm: Any, runner_name: str) -> None:
    """Record what an engine in this process does, from now on.

    Args:
        llm: a `vllm.LLM`.
        runner_name: the model runner it should have.

    Raises:
        ViSpecError: the engine has another runner, more than one process, or is not split where
            this version of the package expects it.
    """
    try:
        # A function is called with the worker itself where there is no other process.
        (worker,) = llm.collective_rpc(lambda worker: worker)
        runner = worker.model_runner
    except Exception as error:
        raise ViSpecError(
            "--serve: the engine has more than one process; a profile needs one, so leave "
            "parallelism and --distributed-executor-backend out"
        ) from error
    probe = RUNNERS[runner_name]
    drafter = getattr(runner, probe.drafter, None)
    if drafter is None:
        raise ViSpecError(
            f"--runner {runner_name}: vLLM started another model runner for this target; choose "
            "the other one"
        )
    target, draft = runner.get_model(), drafter.model
    recorder.wrap(worker, "execute_model", spans.EXECUTE, Batch.from_scheduler)
    places = [
        (llm.llm_engine, "step", spans.STEP),
        (runner, probe.sample, spans.SAMPLE),
        (target, "forward", spans.TARGET_MODEL),
        (target, "compute_logits", spans.TARGET_LOGITS),
        (drafter, "propose", spans.PROPOSE),
        (drafter, probe.draft_sample, spans.DRAFT_SAMPLE),
        (draft, "embed_input_ids", spans.DRAFT_EMBED),
        (draft, "forward", spans.DRAFT_MODEL),
        (draft, "compute_logits", spans.DRAFT_LOGITS),
    ]
    if hasattr(target, "embed_multimodal"):
        places.append((target, "embed_multimodal", spans.VISION))
    if hasattr(draft, "get_top_tokens"):
        # With use_local_argmax_reduction the draft is asked for tokens instead of logits.
        places.append((draft, "get_top_tokens", spans.DRAFT_LOGITS))
    # Only a ViSpec draft has these; a head without compression lacks the adaptor.
    ours = {
        spans.ROWS: getattr(drafter, "draft_rows", None),
        spans.ADAPTOR: getattr(getattr(draft, "model", None), "adaptor", None),
    }
    for name, owner in ours.items():
        for method, value in vars(type(owner)).items() if owner is not None else ():
            if not method.startswith("_") and callable(value):
                places.append((owner, method, name))
    for owner, method, name in places:
        recorder.wrap(owner, method, name)


def main() -> None:
    """Start the engine of the first request, answer the others until stdin ends."""
    engines: list[ProfiledEngine] = []

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        try:
            if engines:
                return engines[0].chat(**request)
            engines.append(ProfiledEngine(Job.from_json(request)))
        except Exception as error:
            traceback.print_exc()
            return {"error": str(error) or type(error).__name__}
        return {}

    serve_requests(reply)
    for engine in engines:
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
