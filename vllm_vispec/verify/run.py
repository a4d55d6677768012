"""From settings to a `Verification`: engines one after another, then the attention backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_vispec.bench.machine import describe_machine, has_gpu
from vllm_vispec.bench.runner import interruptible
from vllm_vispec.bench.worker_process import RequestFailed, WorkerProcess
from vllm_vispec.errors import ViSpecError
from vllm_vispec.tree.codes import num_channels
from vllm_vispec.tree.settings import TreeSettings
from vllm_vispec.verify.causes import cause_in_log, points_at_log
from vllm_vispec.verify.prompts import PROMPTS
from vllm_vispec.verify.result import (
    CHAIN,
    FAILED,
    PLAIN,
    SCHEMA_VERSION,
    TREE,
    Acceptance,
    Answer,
    AttentionCase,
    AttentionError,
    EngineResult,
    EngineState,
    Layers,
    Timings,
    Verdict,
    Verification,
)
from vllm_vispec.verify.settings import MAX_TOKENS, TIMED_TOKENS, VerifySettings
from vllm_vispec.verify.verdict import (
    ALONE,
    TOGETHER,
    find_differences,
    find_noise,
    judge,
    tolerance,
)

WORKER = "vllm_vispec.verify.worker"
TIMED_PROMPTS = (0, 2)
MASK_CHANNELS = 8
"""What masking adds to a draft's heads at least, in steps of which head sizes grow."""
BACKENDS = {
    "cpu": ("CPU_ATTN",),
    "cuda": ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"),
}
"""Which are tried, by the name of vLLM's device; each says itself whether it can serve."""
_CONFIG_ARGS = (
    "model",
    "dtype",
    "max_model_len",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "quantization",
    "revision",
    "trust_remote_code",
)
"""What of the engine's arguments attention depends on."""

Step = Callable[[str], None]
MakeProcess = Callable[[str, Path], Any]


class Refused(RequestFailed):
    """vllm-vispec refuses the settings of an engine."""


class VerifyProcess(WorkerProcess):
    """The child process of one engine, or of one attention backend; its errors are one line."""

    def __init__(self, name: str, log_file: Path) -> None:
        super().__init__(name, WORKER, {}, log_file)

    def error(self, what: str) -> ViSpecError:
        """Name the cause, if the log has one."""
        cause = cause_in_log(self.log_file.read_text(errors="replace"))
        return ViSpecError(f"the engine {what}: {cause or f'see {self.log_file}'}")

    def failed(self, reply: Mapping[str, Any]) -> RequestFailed:
        """Return what the child said, or the cause where vLLM says only where to look."""
        if reply["is_refusal"]:
            return Refused(reply["error"])
        cause = None
        if points_at_log(reply["error"]):
            cause = cause_in_log(self.log_file.read_text(errors="replace"))
        return RequestFailed(cause or reply["error"])


@dataclass(frozen=True)
class Tools:
    """What a verification uses of the world outside; tests put stand-ins here.

    Attributes:
        step: called before each step, with what it does.
    """

    make_process: MakeProcess = VerifyProcess
    machine: Callable[[], dict[str, Any]] = describe_machine
    step: Step = lambda _: None


def num_steps() -> int:
    """Return how often `Tools.step` is called if everything runs."""
    return 3 * (len(PROMPTS) + 3) + len(BACKENDS["cuda" if has_gpu() else "cpu"])


def verify(
    settings: VerifySettings, output: Path, command: str, tools: Tools | None = None
) -> Verification:
    """Run everything; engines are gone when this returns, also after SIGINT and SIGTERM.

    Args:
        output: where the JSON will be; logs are put beside it.
        command: what the user ran.

    Raises:
        KeyboardInterrupt: on SIGINT and SIGTERM.
    """
    tools = tools or Tools()
    with interruptible():
        engines = [run_engine(settings, PLAIN, range(len(PROMPTS)), output, tools)]
        plain = engines[0]
        if plain.error is None:
            places = _answered(plain)
            engines += [run_engine(settings, name, places, output, tools) for name in (CHAIN, TREE)]
        attention = tuple(check_backends(settings, engines, output, tools))
    return summarise(settings, engines, attention, command, tools.machine())


def run_engine(
    settings: VerifySettings, name: str, places: Sequence[int], output: Path, tools: Tools
) -> EngineResult:
    """Start an engine, let it answer prompts alone and together, and time it.

    Args:
        name: plain, chain or tree.
        places: of the prompts.
    """
    log = _log(output, name)
    found: dict[str, Any] = {}
    try:
        with tools.make_process(name, log) as process:
            tools.step(f"{name}: start")
            engine = settings.engine_args(name)
            reply = process.request({"do": "start", "engine": engine})
            found["state"] = EngineState.from_json(reply["state"])
            found["answers"] = _answers(process, name, places, tools.step)
            if name != PLAIN:
                reply = process.request({"do": "acceptance"})
                found["acceptance"] = Acceptance.from_json(reply["acceptance"])
            tools.step(f"{name}: timings")
            process.request({"do": "watch"})
            for place in TIMED_PROMPTS:
                if place in places:
                    process.request(_ask([place], TIMED_TOKENS))
            passes = settings.num_draft_passes(name)
            reply = process.request({"do": "timings", "num_draft_passes": passes})
            found["timings"] = Timings.from_json(reply["timings"])
    except ViSpecError as error:
        found |= {"error": str(error), "is_refusal": isinstance(error, Refused)}
    return EngineResult(name, str(log), **found)


def _answers(
    process: Any, name: str, places: Sequence[int], step: Step
) -> dict[str, dict[str, Answer]]:
    """Ask prompts one by one, then all together; plain vLLM's logprobs are kept."""
    alone: dict[str, Answer] = {}
    answered = []
    for place in places:
        step(f"{name}: {PROMPTS[place].name}")
        try:
            reply = process.request(_ask([place], MAX_TOKENS, logprobs=name == PLAIN))
        except RequestFailed as error:
            alone[PROMPTS[place].name] = Answer(error=str(error))
            continue
        alone[PROMPTS[place].name] = Answer.from_json(reply["answers"][0])
        answered.append(place)
    if not answered:
        raise ViSpecError(f"no prompt was answered: {next(iter(alone.values())).error}")
    step(f"{name}: all together")
    reply = process.request(_ask(answered, MAX_TOKENS, logprobs=name == PLAIN))
    together = {
        PROMPTS[place].name: Answer.from_json(answer)
        for place, answer in zip(answered, reply["answers"], strict=True)
    }
    return {ALONE: alone, TOGETHER: together}


def _ask(places: Sequence[int], max_tokens: int, logprobs: bool = False) -> dict[str, Any]:
    return {
        "do": "ask",
        "prompts": list(places),
        "max_tokens": max_tokens,
        "logprobs": logprobs,
    }


def _answered(plain: EngineResult) -> list[int]:
    alone = (plain.answers or {})[ALONE]
    return [place for place, prompt in enumerate(PROMPTS) if alone[prompt.name].error is None]


def _log(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}-{name}.log")


def attention_cases(
    settings: VerifySettings, engines: Sequence[EngineResult]
) -> Iterator[AttentionCase]:
    """Yield what the engines ask of attention; where one did not start, what it would ask."""
    states = {one.name: one.state for one in engines if one.state is not None}
    if PLAIN not in states:
        return
    plain = states[PLAIN].target[0]
    chain = states[CHAIN].draft[0] if CHAIN in states else _padded(plain, MASK_CHANNELS)
    if chain.padded_size > chain.head_size:
        yield _case(CHAIN, chain, 1)
    tree = TreeSettings.from_config(settings.tree)
    channels = num_channels(tree.levels, tree.top_k)
    if channels:
        target = states[TREE].target[0] if TREE in states else _padded(plain, channels)
        yield _case(TREE, target, settings.tree_nodes + 1, settings.tree)


def _padded(layers: Layers, channels: int) -> Layers:
    step = MASK_CHANNELS
    return replace(layers, padded_size=-(-(layers.head_size + channels) // step) * step)


def _case(
    feature: str, layers: Layers, decode_rows: int, tree: dict[str, Any] | None = None
) -> AttentionCase:
    return AttentionCase(
        feature,
        layers.head_size,
        layers.padded_size,
        layers.num_heads,
        layers.num_kv_heads,
        decode_rows,
        tree,
    )


def check_backends(
    settings: VerifySettings, engines: Sequence[EngineResult], output: Path, tools: Tools
) -> Iterator[AttentionError]:
    """Yield the errors of every backend, each in a process of its own: some end theirs."""
    cases = list(attention_cases(settings, engines))
    if not cases:
        return
    state = engines[0].state
    assert state is not None
    args = settings.engine_args(PLAIN)
    config = {"do": "configure", "engine": {k: args[k] for k in _CONFIG_ARGS if k in args}}
    for backend in BACKENDS.get(state.device_type, ()):
        tools.step(f"attention: {backend}")
        waiting = list(cases)
        try:
            with tools.make_process(backend, _log(output, f"attention-{backend}")) as process:
                process.request(config)
                while waiting:
                    asked = {"do": "attention", "case": waiting[0].to_json(), "backend": backend}
                    yield AttentionError.from_json(process.request(asked)["attention"])
                    waiting.pop(0)
        except ViSpecError as error:
            for case in waiting:
                yield AttentionError(case, backend, failure=str(error))


def summarise(
    settings: VerifySettings,
    engines: Sequence[EngineResult],
    attention: Sequence[AttentionError],
    command: str,
    machine: dict[str, Any],
) -> Verification:
    """Compare and judge."""
    plain, others = engines[0], engines[1:]
    dtype = plain.state.dtype if plain.state is not None else "bfloat16"
    allowed = tolerance(dtype, str(settings.engine.get("kv_cache_dtype", "auto")))
    noise, differences = None, {}
    if plain.error is None and plain.answers is not None:
        noise = find_noise(plain.answers, dtype)
        differences = {
            one.name: tuple(find_differences(plain.answers, one.answers or {}, noise))
            for one in others
        }
    verdicts = [
        judge(one, differences[one.name], attention, allowed, settings.is_shipped_pair)
        for one in others
    ] or [
        Verdict(name, FAILED, (f"plain vLLM does not start: {plain.error}",))
        for name in (CHAIN, TREE)
    ]
    alone = (plain.answers or {}).get(ALONE, {})
    return Verification(
        SCHEMA_VERSION,
        command,
        machine,
        settings.to_json(),
        tuple(engines),
        {name: answer.error for name, answer in alone.items() if answer.error is not None},
        noise,
        differences,
        tuple(attention),
        allowed,
        tuple(verdicts),
    )
