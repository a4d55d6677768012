"""The engine process of one side: requests on stdin, replies on stdout, a JSON object a line.

The engine lives in this very process, where it can be looked into, and works only while it is
asked, so that two of them can wait beside each other.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, cast

from vllm_vispec.bench.profile.probes import find_runner
from vllm_vispec.bench.profile.rounds import Wanted, find_rounds
from vllm_vispec.bench.profile.spans import CLOCKS, Recorder
from vllm_vispec.bench.schema import Record
from vllm_vispec.compat.check import require
from vllm_vispec.compat.groups import PROFILE
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.compat.patch_point import Runner

FIRST_ARGS = (
    # Inside of a graph nothing can be timed.
    "--enforce-eager",
    # A repeated request has to be the same work.
    "--no-enable-prefix-caching",
    "--mm-processor-cache-gb=0",
    "--no-async-scheduling",
)
"""vLLM's options unless the user says otherwise."""


@dataclass(frozen=True)
class Job(Record):
    """One side's engine.

    Attributes:
        serve_args: vLLM's options.
        speculative_config: vLLM's, with method, model and K.
        runner: a name in `probes.RUNNERS`.
        clock: a name in `spans.CLOCKS`.
        concurrency: requests of a full decoding round.
    """

    target: str
    serve_args: tuple[str, ...]
    speculative_config: dict[str, Any]
    runner: str
    clock: str
    concurrency: int

    @property
    def wanted(self) -> Wanted:
        """Which rounds count."""
        return Wanted(self.speculative_config["num_speculative_tokens"], self.concurrency)


class ProfiledEngine:
    """A running `vllm.LLM` whose rounds are recorded."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        from vllm_vispec.plugin import register

        require(PROFILE, cast("Runner", job.runner))
        register()
        self.job = job
        options = engine_options(job.serve_args)
        self.llm: Any = LLM(job.target, speculative_config=dict(job.speculative_config), **options)
        self.recorder = Recorder(CLOCKS[job.clock])
        find_runner(job.runner).install(self.recorder, self.llm)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer requests together and greedily, with empty caches; returns their `Found`."""
        self._forget()
        self.recorder.take()
        self._chat(request)
        return find_rounds(self.recorder.take(), self.job.wanted).to_json()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one request; returns its text."""
        return {"text": self._chat(request)[0].outputs[0].text}

    def _chat(self, request: Mapping[str, Any]) -> list[Any]:
        from vllm import SamplingParams

        limits = request["max_tokens"]
        params = [SamplingParams(temperature=0.0, max_tokens=limit) for limit in limits]
        outputs: list[Any] = self.llm.chat(request["messages"], params, use_tqdm=False)
        return outputs

    def _forget(self) -> None:
        """Let the vision tower and the adaptor run again for images that were seen before."""
        engine = self.llm.llm_engine
        engine.reset_prefix_cache()
        engine.reset_mm_cache()
        engine.reset_encoder_cache()


ACTIONS: Mapping[str, Callable[[ProfiledEngine, Mapping[str, Any]], dict[str, Any]]] = (
    MappingProxyType({"ask": ProfiledEngine.ask, "answer": ProfiledEngine.answer})
)


def engine_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return keyword arguments for `vllm.LLM` from options of the command line.

    Raises:
        ViSpecError: vLLM does not know an option.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    usual = vars(parser.parse_args([]))
    try:
        given = vars(parser.parse_args([*FIRST_ARGS, *arguments]))
    except SystemExit as error:
        raise ViSpecError(
            f"--serve {' '.join(arguments)}: an engine of vLLM does not take these options"
        ) from error
    known = {name: given[name] for name in usual if given[name] != usual[name]}
    # What makes the sides and the target is not for the user to say here.
    return {name: known[name] for name in known if name not in ("model", "speculative_config")}


def serve(lines: IO[str], replies: IO[str]) -> None:
    """Build the engine of the first line, then do what each further line says until they end."""
    try:
        engine = ProfiledEngine(Job.from_json(json.loads(lines.readline())))
    except ViSpecError as error:
        _write(replies, {"error": str(error)})
        return
    _write(replies, {"ready": True})
    for line in lines:
        request = json.loads(line)
        try:
            reply = ACTIONS[request["do"]](engine, request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": str(error) or type(error).__name__}
        _write(replies, reply)
    engine.llm.llm_engine.engine_core.shutdown()


def _write(replies: IO[str], content: Mapping[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def main() -> None:
    """Keep stdout for replies; whatever else prints there goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
