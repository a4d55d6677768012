"""The load on a server: `vllm bench serve` with questions of our own.

Questions go in as ready chat messages, images as data URLs, through vLLM's dataset "custom". Its
tokenizer is left out (`--skip-tokenizer-init`): the server's own counts of tokens are used.

Run as a program, this module is the child process that makes loads. It pays for the imports of
`vllm bench serve` once: ten seconds of a core, 45 minutes in a report of 250 cells that is
measured in 30.
"""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vllm_vispec.bench.machine import server_environment
from vllm_vispec.bench.schema import BenchSample, Request, SpecCounters
from vllm_vispec.utils.engine_start import find_cause
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.process import WorkerProcess, serve_requests

CHAT = "/v1/chat/completions"
WORKER = "vllm_vispec.bench.load"
_COLUMNS = {
    "output_text": "generated_texts",
    "output_tokens": "output_lens",
    "prompt_tokens": "input_lens",
    "ttft_s": "ttfts",
    "e2e_s": "latencies",
    "itl_s": "itls",
    "error": "errors",
}
"""Fields of `Request` by vLLM's names of their lists."""


@dataclass(frozen=True)
class LoadJob:
    """One run of the load generator.

    Attributes:
        url: the server's address.
        model: the name it serves.
        samples: what to ask, in order.
        questions: file with them, as vLLM's dataset "custom" reads it.
        concurrency: requests in flight.
        temperature: 0 is greedy.
        result: JSON file to write.
        timeout_s: longest run.
    """

    url: str
    model: str
    samples: tuple[BenchSample, ...]
    questions: Path
    concurrency: int
    temperature: float
    result: Path
    timeout_s: float

    def arguments(self) -> list[str]:
        """Return what follows `vllm bench serve` on the command line."""
        body = {
            # vLLM's dataset has one limit for all requests.
            "max_completion_tokens": max(sample.max_tokens for sample in self.samples),
            # So that texts differ wherever tokens do.
            "skip_special_tokens": False,
        }
        options = {
            "--backend": "openai-chat",
            "--base-url": self.url,
            "--endpoint": CHAT,
            "--model": self.model,
            "--dataset-name": "custom",
            "--dataset-path": str(self.questions),
            "--num-prompts": str(len(self.samples)),
            "--max-concurrency": str(self.concurrency),
            "--temperature": f"{self.temperature:g}",
            "--extra-body": json.dumps(body),
            # Whoever asks has seen the server answer; a test request would count as load.
            "--ready-check-timeout-sec": "0",
            "--result-dir": str(self.result.parent),
            "--result-filename": self.result.name,
        }
        flags = ["--skip-tokenizer-init", "--disable-shuffle", "--no-oversample", "--disable-tqdm"]
        flags += ["--save-result", "--save-detailed"]
        return [*(part for pair in options.items() for part in pair), *flags]

    @property
    def command(self) -> str:
        """What a user types to make this load."""
        return shlex.join(["vllm", "bench", "serve", *self.arguments()])


@dataclass(frozen=True)
class LoadResult:
    """What a load came to: its requests in order, the seconds it took, what was drafted."""

    requests: tuple[Request, ...]
    wall_s: float
    spec: SpecCounters | None = None


class _LoadWorker(WorkerProcess):
    def error(self, what: str) -> ViSpecError:
        cause = find_cause(self.log())
        return ViSpecError(f"vllm bench serve {what}: {cause} (log: {self.log_file})")


class LoadGenerator:
    """Makes loads in a child process that starts with the first. Use it as a context manager.

    After a load that fails or takes too long the next one has a new child.
    """

    _worker: WorkerProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop(0)

    def __call__(self, job: LoadJob) -> LoadResult:
        """Make the load and read what came of it.

        Raises:
            ViSpecError: the generator fails or takes too long, its result is not whole, or no
                request was answered.
        """
        job.result.unlink(missing_ok=True)
        job.result.parent.mkdir(parents=True, exist_ok=True)
        if self._worker is None:
            log_file = job.result.with_suffix(".log")
            self._worker = _LoadWorker("load", WORKER, server_environment(), log_file).__enter__()
        try:
            self._worker.request({"arguments": job.arguments()}, job.timeout_s)
        except BaseException:
            # Also on a signal: what it is still doing would be load on the next cell.
            self.__exit__()
            raise
        return read_result(job.result, job.samples)


def make_load(request: dict[str, Any]) -> dict[str, Any]:
    """Do in this process what `vllm bench serve ARGUMENTS` does."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(request["arguments"]))
    # The benchmark takes all that is alive out of garbage collection, its own results too.
    gc.unfreeze()
    return {}


def chat_messages(sample: BenchSample) -> list[dict[str, Any]]:
    """Return a sample as OpenAI messages with images as data URLs.

    Raises:
        ViSpecError: an image is missing or broken.
    """
    from vllm_vispec.data.images import BadImage
    from vllm_vispec.data.template import to_openai

    try:
        return to_openai(sample.turns, Path("/"))
    except BadImage as error:
        raise ViSpecError(
            f"sample {sample.sample_id}: {error}; mend the dataset or leave the sample out"
        ) from error


def read_result(file: Path, samples: Sequence[BenchSample]) -> LoadResult:
    """Read the detailed JSON of `vllm bench serve`.

    Raises:
        ViSpecError: it is missing, or not what this version of the package knows; or no request
            was answered, with the first one's reason.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        columns = [content[name] for name in _COLUMNS.values()]
        requests = tuple(
            _request(sample, dict(zip(_COLUMNS, values, strict=True)))
            for sample, *values in zip(samples, *columns, strict=True)
        )
        found = LoadResult(requests, float(content["duration"]), _spec(content))
    except (OSError, ValueError, KeyError) as error:
        raise ViSpecError(f"the result of vllm bench serve cannot be read: {error!r}") from error
    errors = [request.error for request in requests]
    if None not in errors:
        raise ViSpecError(f"no request was answered: {errors[0]}")
    return found


def _spec(content: Mapping[str, Any]) -> SpecCounters | None:
    """Return what was drafted; vLLM is silent where that is nothing."""
    if "spec_decode_num_drafts" not in content:
        return None
    drafts = content["spec_decode_num_drafts"]
    rates = content["spec_decode_per_position_acceptance_rates"]
    return SpecCounters(
        steps=drafts,
        draft_tokens=content["spec_decode_draft_tokens"],
        accepted_tokens=content["spec_decode_accepted_tokens"],
        accepted_by_position=tuple(round(rate * drafts) for rate in rates),
    )


def _request(sample: BenchSample, values: dict[str, Any]) -> Request:
    # The stream opens with an empty chunk that names the role, sent along with the first token's;
    # the gap between these two is no time between tokens.
    values["itl_s"] = tuple(round(gap, 6) for gap in values["itl_s"][1:])
    values |= {name: round(values[name], 6) for name in ("ttft_s", "e2e_s")}
    # vLLM keeps a traceback; its last line says what happened.
    values["error"] = next(iter(values["error"].strip().splitlines()[-1:]), None)
    return Request(sample.sample_id, sample.family, **values)


if __name__ == "__main__":
    serve_requests(make_load)
