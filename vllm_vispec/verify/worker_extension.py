"""What `vispec verify` asks of vLLM's workers (`worker_extension_cls`); plain data only.

Read from the worker's state, with both runners and wherever the worker's process is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_vispec.bench.profile.spans import wall_time
from vllm_vispec.verify.result import EngineState, Graphs, Layers

_FIRST_PASS_ENDS = {"drafter": "_sample_draft_tokens", "speculator": "on_prefill_end"}
"""Where the V1 and the V2 runner keep what drafts, and what that calls right behind its first pass,
outside of any CUDA graph."""
_MANAGERS = {
    "cudagraph_manager": "target",
    "prefill_cudagraph_manager": "draft's first pass",
    "decode_cudagraph_manager": "draft steps",
}
"""The V2 runner's and its speculator's attributes that hold full graphs."""


class VerifyWorker:
    """Methods of every worker of an engine that is verified."""

    model_runner: Any
    vllm_config: Any

    def vispec_state(self) -> dict[str, Any]:
        """Return an `EngineState` as plain data."""
        config, runner = self.vllm_config, self.model_runner
        draft, compilation = _draft_of(runner), config.compilation_config
        capability = current_platform.get_device_capability()
        state = EngineState(
            runner="V2" if config.use_v2_model_runner else "V1",
            device_type=current_platform.device_type,
            device=current_platform.get_device_name(),
            capability=capability.as_version_str() if capability else "none",
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            target=_layers(config, runner.get_model()),
            draft=_layers(config, getattr(draft, "model", None)),
            compilation={
                "mode": compilation.mode.name,
                "backend": compilation.backend or "none",
                **{name: count for name, count in vars(compilation_counter).items() if count},
            },
            cudagraph_mode=compilation.cudagraph_mode.name,
            graphs=tuple(_graphs(runner, draft)),
        )
        return state.to_json()

    def vispec_watch(self) -> None:
        """Begin to time decode steps; the device is waited for from now on."""
        self._vispec_steps = StepTimes()
        self._vispec_steps.watch(self.model_runner)

    def vispec_timings(self, num_draft_passes: int) -> dict[str, Any]:
        """Return medians since `vispec_watch`, as `Timings` has them."""
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

    def medians(self, num_draft_passes: int) -> dict[str, Any]:
        """Return medians; a draft's passes behind the first one share their time."""
        found: dict[str, Any] = {name: median(times) for name, times in self._seconds.items()}
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


def _draft_of(runner: Any) -> Any:
    return next((one for name in _FIRST_PASS_ENDS if (one := getattr(runner, name, None))), None)


def _layers(vllm_config: Any, model: Any) -> tuple[Layers, ...]:
    """Count a model's attention layers; a module around a layer knows its unpadded head size."""
    found: Counter[Layers] = Counter()
    for parent in model.modules() if model is not None else ():
        for layer in parent.children():
            if isinstance(layer, Attention):
                spec: Any = layer.get_kv_cache_spec(vllm_config)
                holds = str(getattr(layer.kv_cache, "dtype", "")).removeprefix("torch.")
                head_size = getattr(parent, "head_dim", layer.head_size)
                found[
                    Layers(
                        count=1,
                        backend=layer.attn_backend.get_name(),
                        head_size=head_size,
                        padded_size=getattr(spec, "head_size", head_size),
                        num_heads=layer.num_heads,
                        num_kv_heads=layer.num_kv_heads,
                        kv_cache_dtype=f"{layer.kv_cache_dtype} ({holds})",
                    )
                ] += 1
    return tuple(replace(layers, count=count) for layers, count in found.items())


def _graphs(runner: Any, draft: Any) -> Iterator[Graphs]:
    """Yield the V2 runner's full graphs, and those inside of vLLM's wrappers."""
    for owner in (runner, draft):
        for name, what in _MANAGERS.items():
            captured = getattr(getattr(owner, name, None), "graphs", None) or {}
            if captured:
                yield Graphs(what, "FULL", tuple(sorted({one.num_tokens for one in captured})))
    models = {
        id(getattr(runner, "model", None)): "target",
        id(getattr(draft, "model", None)): "draft",
    }
    sizes: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for wrapper in CUDAGraphWrapper._all_instances:
        key = models.get(id(wrapper), "compiled pieces"), wrapper.runtime_mode.name
        for batch, entry in wrapper.concrete_cudagraph_entries.items():
            if entry.cudagraph is not None:
                sizes[key].add(batch.num_tokens)
    for (what, mode), tokens in sizes.items():
        yield Graphs(what, mode, tuple(sorted(tokens)))
