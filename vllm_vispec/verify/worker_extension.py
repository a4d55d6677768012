"""What `vispec verify` asks of vLLM's workers (`worker_extension_cls`), of both model runners."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_vispec.bench.profile_steps import wall_time
from vllm_vispec.verify.result import EngineState, Layers

_FIRST_PASS_ENDS = {"drafter": "_sample_draft_tokens", "speculator": "on_prefill_end"}
"""Where the V1 and the V2 runner keep what drafts, and what that calls right behind its first pass,
outside of any CUDA graph."""
_MANAGERS = {
    "cudagraph_manager": "target",
    "prefill_cudagraph_manager": "draft's first pass",
    "decode_cudagraph_manager": "draft steps",
    "tree_cudagraph_manager": "growth of draft trees",
    "walk_cudagraph_manager": "walks down draft trees",
}
"""Attributes of the V2 runner and its speculator that hold full graphs."""


class VerifyWorker:
    """Methods of every worker of an engine that is verified."""

    model_runner: Any
    vllm_config: Any

    def vispec_state(self) -> dict[str, Any]:
        """Return an `EngineState` as plain data."""
        config, runner = self.vllm_config, self.model_runner
        compilation, capability = (
            config.compilation_config,
            current_platform.get_device_capability(),
        )
        drafts = (getattr(runner, name, None) for name in _FIRST_PASS_ENDS)
        draft = next((one for one in drafts if one is not None), None)
        return EngineState(
            runner="V2" if config.use_v2_model_runner else "V1",
            device_type=current_platform.device_type,
            device=current_platform.get_device_name(),
            capability=capability.as_version_str() if capability else "none",
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            target=_layers(config, runner.get_model()),
            draft=_layers(config, draft.model) if draft is not None else (),
            compilation={
                "mode": compilation.mode.name,
                "backend": compilation.backend or "none",
                **{name: count for name, count in vars(compilation_counter).items() if count},
            },
            cudagraph_mode=compilation.cudagraph_mode.name,
            graphs=_graphs(runner, draft),
        ).to_json()

    def vispec_watch(self) -> None:
        """Begin to time decode steps; the device is waited for from now on."""
        self._vispec_steps = StepTimes()
        self._vispec_steps.watch(self.model_runner)

    def vispec_timings(self, num_draft_passes: int) -> dict[str, float]:
        """Return `EngineResult.timings` since `vispec_watch`."""
        return self._vispec_steps.medians(num_draft_passes)


class StepTimes:
    """Seconds of the parts of decode steps, by host calls: graphs are replayed as ever."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._is_decode = False
        self._first_pass_end: float | None = None

    def watch(self, runner: Any) -> None:
        """Time the runner's target passes and its proposer; these objects only."""
        _wrap(runner, "execute_model", self._execute)
        for name, first_pass_end in _FIRST_PASS_ENDS.items():
            draft = getattr(runner, name, None)
            if draft is not None:
                _wrap(draft, "propose", self._propose)
                _wrap(draft, first_pass_end, self._end_first_pass)

    def medians(self, num_draft_passes: int) -> dict[str, float]:
        """Return medians; the passes behind a draft's first one share their time."""
        found = {name: median(times) for name, times in self._seconds.items()}
        behind = found.pop("behind_first_pass", None)
        if behind is not None and num_draft_passes > 1:
            found["draft_step"] = behind / (num_draft_passes - 1)
        return {**found, "steps": len(self._seconds["target_step"])}

    def _execute(self, original: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        self._is_decode = tokens > 0 and not scheduler_output.scheduled_new_reqs
        begin = wall_time()
        found = original(scheduler_output, *args, **kwargs)
        self._note("target_step", wall_time() - begin)
        return found

    def _propose(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._first_pass_end = None
        begin = wall_time()
        found = original(*args, **kwargs)
        end = wall_time()
        if self._first_pass_end is not None:
            self._note("draft_first_pass", self._first_pass_end - begin)
            self._note("behind_first_pass", end - self._first_pass_end)
        return found

    def _end_first_pass(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if self._first_pass_end is None:
            self._first_pass_end = wall_time()
        return found

    def _note(self, name: str, seconds: float) -> None:
        if self._is_decode:
            self._seconds[name].append(seconds)


def _wrap(owner: Any, name: str, timed: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: timed(original, *args, **kwargs))


def _layers(vllm_config: Any, model: Any) -> tuple[Layers, ...]:
    """Count a model's attention layers; the module around a layer knows its unpadded head size."""
    found: Counter[Layers] = Counter()
    for parent in model.modules():
        for layer in parent.children():
            if isinstance(layer, Attention):
                spec: Any = layer.get_kv_cache_spec(vllm_config)
                holds = str(getattr(layer.kv_cache, "dtype", "")).removeprefix("torch.")
                head_size = getattr(parent, "head_dim", layer.head_size)
                kind = Layers(
                    count=1,
                    backend=layer.attn_backend.get_name(),
                    head_size=head_size,
                    padded_size=getattr(spec, "head_size", head_size),
                    num_heads=layer.num_heads,
                    num_kv_heads=layer.num_kv_heads,
                    kv_cache_dtype=f"{layer.kv_cache_dtype} ({holds})",
                )
                found[kind] += 1
    return tuple(replace(kind, count=count) for kind, count in found.items())


def _graphs(runner: Any, draft: Any) -> dict[str, tuple[int, ...]]:
    """Return sizes of the V2 runner's full graphs, and of those inside of vLLM's wrappers."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for owner in (runner, draft):
        for name, what in _MANAGERS.items():
            for batch in getattr(getattr(owner, name, None), "graphs", None) or ():
                found[f"{what}, FULL"].add(batch.num_tokens)
    for wrapper in CUDAGraphWrapper._all_instances:
        models = {"target": runner, "draft": draft}.items()
        owners = (name for name, one in models if getattr(one, "model", None) is wrapper)
        key = f"{next(owners, 'compiled pieces')}, {wrapper.runtime_mode.name}"
        for batch, entry in wrapper.concrete_cudagraph_entries.items():
            if entry.cudagraph is not None:
                found[key].add(batch.num_tokens)
    return {name: tuple(sorted(sizes)) for name, sizes in found.items()}
