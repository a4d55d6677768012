"""From settings to a `Verification`: engines one after another, then the attention backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from vllm_vispec.bench.machine import describe_machine, has_gpu, server_environment
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.engine_start import find_cause, spelled_as_option, why
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.process import RequestFailed, WorkerProcess, interruptible
from vllm_vispec.utils.settings import Settings
from vllm_vispec.verify.prompts import PROMPTS
from vllm_vispec.verify.result import (
    ALONE,
    CHAIN,
    FAILED,
    PLAIN,
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
_CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm" / "checkpoints"
SHIPPED_PAIR = str(_CHECKPOINTS / "target"), str(_CHECKPOINTS / "vispec_head")
_OURS = ("model", "speculative_config", "worker_extension_cls", "disable_log_stats")


class EngineOptions(Settings):
    """Engine arguments of vLLM that have options of their own."""

    tensor_parallel_size: int | None = Field(default=None, description="As vLLM's.")
    dtype: str | None = Field(default=None, description="As vLLM's.")
    max_model_len: int | None = Field(default=None, description="As vLLM's.")
    gpu_memory_utilization: float | None = Field(default=None, description="As vLLM's.")
    enforce_eager: bool | None = Field(
        default=None, description="As vLLM's; default: only without a GPU."
    )
    attention_backend: str | None = Field(default=None, description="As vLLM's.")
    kv_cache_dtype: str | None = Field(default=None, description="As vLLM's.")


class VerifySettings(Settings):
    """Which pair is verified, and with which engine options."""

    target: str = Field(
        default="", description="Target: a folder or hub id; default: the shipped pair's."
    )
    head: str = Field(
        default="",
        description="Draft: a head or a published model, folder or hub id; default as above.",
    )
    num_speculative_tokens: int = Field(
        default=4,
        ge=1,
        description="Of the chain.",
        json_schema_extra={"flags": ["--num-speculative-tokens", "-k"]},
    )
    tree: TreeSettings = Field(
        default=TreeSettings(), description="The tree's setting, e.g. '{\"depth\": 5}'; JSON."
    )
    tree_nodes: int = Field(default=29, description="As --num-speculative-tokens, of the tree.")
    engine: dict[str, Any] = Field(
        default={},
        description="More of vLLM's engine arguments, e.g. '{\"max_num_seqs\": 16}'.",
        json_schema_extra={"flags": ["--engine-args"]},
    )
    speculative_config: dict[str, Any] = Field(
        default={}, description="More for both drafts, e.g. '{\"draft_vocab\": 4096}'."
    )

    @model_validator(mode="before")
    @classmethod
    def _choose_pair(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Take the pair of examples/tiny_vlm where the user gave none."""
        is_given = [bool(given.get(name)) for name in ("target", "head")]
        if all(is_given):
            return given
        if any(is_given):
            raise ViSpecError("--target and --head belong together: give both, or neither")
        if not all(Path(folder, "config.json").is_file() for folder in SHIPPED_PAIR):
            raise ViSpecError(
                "the pair of examples/tiny_vlm is not installed here: give --target and --head"
            )
        return given | dict(zip(("target", "head"), SHIPPED_PAIR, strict=True))

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.tree.check_nodes(self.tree_nodes)
        for name in _OURS:
            if name in self.engine:
                raise ViSpecError(
                    f"--engine-args: {name} is set by vispec verify itself; leave it out, and see "
                    "--target, --head and --speculative-config"
                )
        for name in ("model", "num_speculative_tokens", "tree"):
            if name in self.speculative_config:
                raise ViSpecError(
                    f"--speculative-config: {name} has an option of its own (--head, "
                    "--num-speculative-tokens, --tree); leave it out"
                )
        return self

    @property
    def is_shipped_pair(self) -> bool:
        """Whether it is known what the head should accept."""
        return (self.target, self.head) == SHIPPED_PAIR and not self.speculative_config

    def engine_args(self, name: str) -> dict[str, Any]:
        """Return keyword arguments of `vllm.LLM` for the plain, chain or tree engine."""
        # Compiling a small model for a CPU takes longer than everything that is verified.
        usual: dict[str, Any] = {"model": self.target, "seed": 0, "enforce_eager": not has_gpu()}
        args = usual | self.engine
        if name == PLAIN:
            return args
        fixed = {"method": "vispec", "adaptive": False}
        config = fixed | self.speculative_config | {"model": self.head}
        if name == CHAIN:
            config |= {"num_speculative_tokens": self.num_speculative_tokens}
        else:
            tree = self.tree.model_dump(exclude_none=True)
            config |= {"num_speculative_tokens": self.tree_nodes, "tree": tree}
        return args | {"speculative_config": config}

    def num_draft_passes(self, name: str) -> int:
        """Return how often the draft runs for one step's draft tokens."""
        return {PLAIN: 0, CHAIN: self.num_speculative_tokens, TREE: self.tree.levels}[name]


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
class Verifier:
    """Runs one verification.

    Attributes:
        output: where the JSON will be; logs are put beside it.
        step: called before each step, with what it does.
        make_process: tests put a stand-in here.
    """

    settings: VerifySettings
    output: Path
    step: Callable[[str], None] = lambda _: None
    make_process: Callable[[str, Path], Any] = VerifyProcess

    @property
    def num_steps(self) -> int:
        """How often `step` is called if everything runs."""
        return 3 * (len(PROMPTS) + 3) + len(BACKENDS["cuda" if has_gpu() else "cpu"])

    def verify(self, command: str) -> Verification:
        """Run everything; engines are gone when this returns, also after SIGINT and SIGTERM.

        Args:
            command: what the user ran.

        Raises:
            KeyboardInterrupt: on SIGINT and SIGTERM.
        """
        with interruptible():
            plain = self._run_engine(PLAIN, range(len(PROMPTS)))
            engines = [plain]
            if plain.error is None:
                alone = plain.answers[ALONE]
                places = [i for i, one in enumerate(PROMPTS) if alone[one.name].error is None]
                engines += [self._run_engine(name, places) for name in (CHAIN, TREE)]
            attention = tuple(self._check_backends(engines))
        return summarise(self.settings, engines, attention, command)

    def _log(self, name: str) -> Path:
        return self.output.with_name(f"{self.output.stem}-{name}.log")

    def _run_engine(self, name: str, places: Sequence[int]) -> EngineResult:
        """Start an engine, let it answer prompts alone and together, and time it."""
        log, found = self._log(name), dict[str, Any]()
        with self.make_process(name, log) as process:
            try:
                self.step(f"{name}: start")
                reply = process.request({"do": "start", "engine": self.settings.engine_args(name)})
                found["state"] = EngineState(**reply)
                found["answers"] = self._ask(process, name, places)
                if name != PLAIN:
                    found["acceptance"] = Acceptance(**process.request({"do": "acceptance"}))
                self.step(f"{name}: timings")
                process.request({"do": "watch"})
                for place in set(TIMED_PROMPTS).intersection(places):
                    process.request(_asking([place], TIMED_TOKENS))
                passes = self.settings.num_draft_passes(name)
                asked = {"do": "timings", "num_draft_passes": passes}
                found["timings"] = process.request(asked)
            except ViSpecError as error:
                found |= {"error": str(error), "is_refusal": process.refused}
        return EngineResult(name=name, log=str(log), **found)

    def _ask(self, process: Any, name: str, places: Sequence[int]) -> Answers:
        """Ask prompts one by one, then all together."""
        alone: dict[str, Answer] = {}
        answered: dict[str, int] = {}
        for place in places:
            prompt = PROMPTS[place].name
            self.step(f"{name}: {prompt}")
            try:
                reply = process.request(_asking([place], MAX_TOKENS, name == PLAIN))
                alone[prompt] = Answer(**reply["answers"][0])
                answered[prompt] = place
            except RequestFailed as error:
                alone[prompt] = Answer(error=str(error))
        if not answered:
            raise ViSpecError(f"no prompt was answered: {next(iter(alone.values())).error}")
        self.step(f"{name}: all together")
        reply = process.request(_asking([*answered.values()], MAX_TOKENS, name == PLAIN))
        together = (Answer(**one) for one in reply["answers"])
        return {ALONE: alone, TOGETHER: dict(zip(answered, together, strict=True))}

    def _check_backends(self, engines: Sequence[EngineResult]) -> Iterator[AttentionError]:
        """Yield the errors of every backend, each in a process of its own, which it may end."""
        cases, plain = list(attention_cases(self.settings, engines)), engines[0].state
        if plain is None or not cases:
            return
        args = self.settings.engine_args(PLAIN)
        config = {name: args[name] for name in _CONFIG_ARGS if name in args}
        for backend in BACKENDS.get(plain.device_type, ()):
            self.step(f"attention: {backend}")
            waiting = list(cases)
            with self.make_process(backend, self._log(f"attention-{backend}")) as process:
                try:
                    process.request({"do": "configure", "engine": config})
                    while waiting:
                        case = waiting[0].model_dump(mode="json")
                        asked = {"do": "attention", "case": case, "backend": backend}
                        yield AttentionError(**process.request(asked))
                        waiting.pop(0)
                except ViSpecError as error:
                    for one in waiting:
                        yield AttentionError(case=one, backend=backend, failure=str(error))


def _asking(places: list[int], max_tokens: int, logprobs: bool = False) -> dict[str, Any]:
    return {"do": "ask", "prompts": places, "max_tokens": max_tokens, "logprobs": logprobs}


def attention_cases(
    settings: VerifySettings, engines: Sequence[EngineResult]
) -> Iterator[AttentionCase]:
    """Yield what the engines ask of attention; where one did not start, what it would ask."""
    states = {one.name: one.state for one in engines if one.state is not None}
    # Layers of other kinds than vLLM's `Attention`, such as MLA, are not among an engine's.
    if PLAIN not in states or not states[PLAIN].target:
        return
    plain, channels = states[PLAIN].target[0], settings.tree.num_channels
    drafts = states[CHAIN].draft if CHAIN in states else (_padded(plain, MASK_CHANNELS),)
    targets = states[TREE].target if TREE in states else (_padded(plain, channels),)
    for layers in drafts[:1]:
        if layers.padded_size > layers.head_size:
            yield AttentionCase(feature=CHAIN, decode_rows=1, **layers.model_dump())
    for layers in targets[:1]:
        if channels:
            rows, tree = settings.tree_nodes + 1, settings.tree
            yield AttentionCase(feature=TREE, decode_rows=rows, tree=tree, **layers.model_dump())


def _padded(layers: Layers, channels: int) -> Layers:
    steps = -(-(layers.head_size + channels) // MASK_CHANNELS)
    return layers.model_copy(update={"padded_size": steps * MASK_CHANNELS})


def summarise(
    settings: VerifySettings,
    engines: Sequence[EngineResult],
    attention: tuple[AttentionError, ...],
    command: str,
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
        reasons = (f"plain vLLM: {plain.error}",)
        verdicts = [Verdict(feature=name, state=FAILED, reasons=reasons) for name in (CHAIN, TREE)]
    return Verification(
        command=command,
        environment=describe_machine(),
        settings=settings.model_dump(),
        engines=(_without_logprobs(plain), *others),
        noise=noise,
        differences=differences,
        attention=attention,
        tolerance=allowed,
        verdicts=tuple(verdicts),
    )


def _without_logprobs(plain: EngineResult) -> EngineResult:
    """Leave out what was only there to be compared."""
    answers = {
        batch: {name: one.model_copy(update={"top": ()}) for name, one in many.items()}
        for batch, many in plain.answers.items()
    }
    return plain.model_copy(update={"answers": answers})
