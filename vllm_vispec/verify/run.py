"""From settings to a `Verification`: engines one after another, then the attention backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_vispec.bench.machine import describe_machine, has_gpu, server_environment
from vllm_vispec.trees.codes import num_channels
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.engine_start import find_cause, spelled_as_option, why
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.process import RequestFailed, WorkerProcess, interruptible
from vllm_vispec.verify.prompts import PROMPTS
from vllm_vispec.verify.result import (
    ALONE,
    CHAIN,
    FAILED,
    PLAIN,
    SCHEMA_VERSION,
    TOGETHER,
    TREE,
    Acceptance,
    Answer,
    Answers,
    AttentionCase,
    AttentionError,
    EngineResult,
    EngineState,
    Layers,
    Verdict,
    Verification,
    find_differences,
    find_noise,
    judge,
    tolerance,
)
from vllm_vispec.verify.settings import VerifySettings

WORKER = "vllm_vispec.verify.worker"
MAX_TOKENS, TIMED_TOKENS, TIMED_PROMPTS = 48, 64, (0, 2)
MASK_CHANNELS = 8
"""What masking adds to a draft's heads at least; head sizes grow in such steps."""
BACKENDS = {
    "cpu": ("CPU_ATTN",),
    "cuda": ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"),
}
"""Which are tried, by vLLM's type of device; each says itself whether it can serve."""
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


class VerifyProcess(WorkerProcess):
    """The child process of one engine, or of one attention backend.

    Attributes:
        refused: vllm-vispec refused the settings.
    """

    refused = False

    def __init__(self, name: str, log_file: Path) -> None:
        super().__init__(name, WORKER, server_environment(), log_file)

    def failed(self, reply: Mapping[str, Any]) -> RequestFailed:
        """Return the cause: the child's own error may only say that another process has one."""
        log = self.log()
        own = f"{ViSpecError.__name__}: {find_cause(log)}"
        self.refused = reply["is_refusal"] or own in log
        return RequestFailed(why(log, spelled_as_option))


@dataclass(frozen=True)
class Tools:
    """What a verification uses of the world outside; tests put stand-ins here.

    Attributes:
        step: called before each step, with what it does.
    """

    make_process: Callable[[str, Path], Any] = VerifyProcess
    machine: Callable[[], dict[str, Any]] = describe_machine
    step: Callable[[str], None] = lambda _: None


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
        plain = run_engine(settings, PLAIN, range(len(PROMPTS)), output, tools)
        engines = [plain]
        if plain.error is None:
            alone = plain.answers[ALONE]
            places = [i for i, one in enumerate(PROMPTS) if alone[one.name].error is None]
            engines += [run_engine(settings, name, places, output, tools) for name in (CHAIN, TREE)]
        attention = list(check_backends(settings, engines, output, tools))
    return summarise(settings, engines, attention, command, tools.machine())


def run_engine(
    settings: VerifySettings, name: str, places: Sequence[int], output: Path, tools: Tools
) -> EngineResult:
    """Start an engine, let it answer prompts alone and together, and time it.

    Args:
        name: plain, chain or tree.
        places: of the prompts.
    """
    log, found = _log(output, name), dict[str, Any]()
    with tools.make_process(name, log) as process:
        try:
            tools.step(f"{name}: start")
            reply = process.request({"do": "start", "engine": settings.engine_args(name)})
            found["state"] = EngineState.from_json(reply["state"])
            found["answers"] = _answers(process, name, places, tools)
            if name != PLAIN:
                reply = process.request({"do": "acceptance"})
                found["acceptance"] = Acceptance.from_json(reply["acceptance"])
            tools.step(f"{name}: timings")
            process.request({"do": "watch"})
            for place in set(TIMED_PROMPTS).intersection(places):
                process.request(_ask([place], TIMED_TOKENS))
            passes = settings.num_draft_passes(name)
            found |= process.request({"do": "timings", "num_draft_passes": passes})
        except ViSpecError as error:
            found |= {"error": str(error), "is_refusal": process.refused}
    return EngineResult(name, str(log), **found)


def _answers(process: Any, name: str, places: Sequence[int], tools: Tools) -> Answers:
    """Ask prompts one by one, then all together."""
    alone: dict[str, Answer] = {}
    for place in places:
        prompt = PROMPTS[place].name
        tools.step(f"{name}: {prompt}")
        try:
            reply = process.request(_ask([place], MAX_TOKENS, logprobs=name == PLAIN))
            alone[prompt] = Answer.from_json(reply["answers"][0])
        except RequestFailed as error:
            alone[prompt] = Answer(error=str(error))
    answered = [place for place in places if alone[PROMPTS[place].name].error is None]
    if not answered:
        raise ViSpecError(f"no prompt was answered: {next(iter(alone.values())).error}")
    tools.step(f"{name}: all together")
    reply = process.request(_ask(answered, MAX_TOKENS, logprobs=name == PLAIN))
    names = (PROMPTS[place].name for place in answered)
    together = {
        prompt: Answer.from_json(one) for prompt, one in zip(names, reply["answers"], strict=True)
    }
    return {ALONE: alone, TOGETHER: together}


def _ask(places: Sequence[int], max_tokens: int, logprobs: bool = False) -> dict[str, Any]:
    asked = {"prompts": list(places), "max_tokens": max_tokens, "logprobs": logprobs}
    return {"do": "ask", **asked}


def _log(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}-{name}.log")


def attention_cases(
    settings: VerifySettings, engines: Sequence[EngineResult]
) -> Iterator[AttentionCase]:
    """Yield what the engines ask of attention; where one did not start, what it would ask."""
    states = {one.name: one.state for one in engines if one.state is not None}
    if PLAIN not in states:
        return
    tree = TreeSettings.from_config(settings.tree)
    channels = num_channels(tree.levels, tree.width)
    # Layers of other kinds than vLLM's `Attention`, such as MLA, are not among an engine's.
    for plain in states[PLAIN].target[:1]:
        drafts = states[CHAIN].draft if CHAIN in states else (_padded(plain, MASK_CHANNELS),)
        for layers in drafts[:1]:
            if layers.padded_size > layers.head_size:
                yield _case(CHAIN, layers, 1, {})
        targets = states[TREE].target if TREE in states else (_padded(plain, channels),)
        for layers in targets[:1]:
            if channels:
                yield _case(TREE, layers, settings.tree_nodes + 1, settings.tree)


def _padded(layers: Layers, channels: int) -> Layers:
    steps = -(-(layers.head_size + channels) // MASK_CHANNELS)
    return replace(layers, padded_size=steps * MASK_CHANNELS)


def _case(feature: str, layers: Layers, rows: int, tree: dict[str, Any]) -> AttentionCase:
    sizes = layers.head_size, layers.padded_size, layers.num_heads, layers.num_kv_heads
    return AttentionCase(feature, *sizes, rows, tree)


def check_backends(
    settings: VerifySettings, engines: Sequence[EngineResult], output: Path, tools: Tools
) -> Iterator[AttentionError]:
    """Yield the errors of every backend, each in a process of its own, which it may end."""
    waiting = list(attention_cases(settings, engines))
    if not waiting:
        return
    assert engines[0].state is not None
    args = settings.engine_args(PLAIN)
    config = {name: args[name] for name in _CONFIG_ARGS if name in args}
    for backend in BACKENDS.get(engines[0].state.device_type, ()):
        tools.step(f"attention: {backend}")
        cases = list(waiting)
        with tools.make_process(backend, _log(output, f"attention-{backend}")) as process:
            try:
                process.request({"do": "configure", "engine": config})
                while cases:
                    asked = {"do": "attention", "case": cases[0].to_json(), "backend": backend}
                    yield AttentionError.from_json(process.request(asked)["attention"])
                    cases.pop(0)
            except ViSpecError as error:
                yield from (AttentionError(case, backend, failure=str(error)) for case in cases)


def summarise(
    settings: VerifySettings,
    engines: Sequence[EngineResult],
    attention: Sequence[AttentionError],
    command: str,
    machine: dict[str, Any],
) -> Verification:
    """Compare and judge."""
    plain, others = engines[0], engines[1:]
    dtype = plain.state.dtype if plain.state is not None else ""
    allowed = tolerance(dtype, str(settings.engine.get("kv_cache_dtype", "auto")))
    noise = find_noise(plain.answers, dtype) if plain.answers else None
    differences = {
        one.name: tuple(find_differences(plain.answers, one.answers, noise))
        for one in others
        if noise is not None
    }
    verdicts = [
        judge(one, differences[one.name], attention, allowed, settings.is_shipped_pair)
        for one in others
    ]
    if not others:
        reason = f"plain vLLM: {plain.error}"
        verdicts = [Verdict(name, FAILED, (reason,)) for name in (CHAIN, TREE)]
    return Verification(
        SCHEMA_VERSION,
        command,
        machine,
        settings.to_json(),
        (_without_logprobs(plain), *others),
        noise,
        differences,
        tuple(attention),
        allowed,
        tuple(verdicts),
    )


def _without_logprobs(plain: EngineResult) -> EngineResult:
    """Leave out what was only there to be compared."""
    answers = {
        batch: {name: replace(one, top=()) for name, one in many.items()}
        for batch, many in plain.answers.items()
    }
    return replace(plain, answers=answers)
