"""What `vispec verify` asks of vLLM's workers (`worker_extension_cls`), of both model runners."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_vispec.bench.profile_steps import EXECUTE, PROPOSE, Batch, Recorder, Span, wall_time
from vllm_vispec.verify.result import EngineState, Layers

FIRST_PASS_END = "first pass end"
_FIRST_PASS_ENDS = {"drafter": "_sample_draft_tokens", "speculator": "on_prefill_end"}
"""Where the V1 and the V2 runner keep what drafts, and what that calls right behind its first pass,
outside of any CUDA graph."""


class VerifyWorker:
    """Methods of every worker of an engine that is verified."""

    model_runner: Any
    vllm_config: Any

    def vispec_state(self) -> dict[str, Any]:
        """Return an `EngineState` as plain data."""
        config, runner, draft = self.vllm_config, self.model_runner, self._vispec_draft()
        compilation = config.compilation_config
        capability = current_platform.get_device_capability()
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
        """Begin to time decode steps; the device is waited for from now on.

        Host calls are timed: graphs are replayed as ever.
        """
        self._vispec_recorder = Recorder(wall_time)
        self._vispec_recorder.wrap(self, "execute_model", EXECUTE, Batch.from_scheduler)
        for name, first_pass_end in _FIRST_PASS_ENDS.items():
            draft = getattr(self.model_runner, name, None)
            if draft is not None:
                self._vispec_recorder.wrap(draft, "propose", PROPOSE)
                self._vispec_recorder.wrap(draft, first_pass_end, FIRST_PASS_END)

    def vispec_timings(self, num_draft_passes: int) -> dict[str, float]:
        """Return `EngineResult.timings` since `vispec_watch`."""
        return decode_timings(self._vispec_recorder.take(), num_draft_passes)

    def _vispec_draft(self) -> Any:
        drafts = (getattr(self.model_runner, name, None) for name in _FIRST_PASS_ENDS)
        return next((draft for draft in drafts if draft is not None), None)


def decode_timings(spans: Sequence[Span], num_draft_passes: int) -> dict[str, float]:
    """Return medians over decode steps; the passes behind a draft's first one share their time."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    is_decode, propose = False, None
    for span in spans:
        if span.name == EXECUTE:
            assert span.batch is not None
            is_decode = any(span.batch.scheduled) and not span.batch.prompts
            if is_decode:
                seconds["target_step"].append(span.seconds)
        elif span.name == PROPOSE:
            propose = span
        elif propose is not None:
            if is_decode:
                seconds["draft_first_pass"].append(span.end - propose.begin)
                if num_draft_passes > 1:
                    behind = propose.end - span.end
                    seconds["draft_step"].append(behind / (num_draft_passes - 1))
            propose = None
    found = {name: median(times) for name, times in seconds.items()}
    return {**found, "steps": len(seconds["target_step"])}


def _layers(vllm_config: Any, model: Any) -> tuple[Layers, ...]:
    """Count a model's attention layers; the module around a layer knows its unpadded head size."""
    found: Counter[Layers] = Counter()
    for parent in model.modules():
        for layer in parent.children():
            if isinstance(layer, Attention):
                given = layer.get_kv_cache_spec(vllm_config)
                spec: Any = layer.attn_backend.customize_spec(given)
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
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, CudaGraphManager):
                for batch in value.graphs:
                    found[f"{name}, FULL"].add(batch.num_tokens)
    for wrapper in CUDAGraphWrapper._all_instances:
        models = {"target": runner, "draft": draft}.items()
        owners = (name for name, one in models if getattr(one, "model", None) is wrapper)
        key = f"{next(owners, 'compiled pieces')}, {wrapper.runtime_mode.name}"
        for batch, entry in wrapper.concrete_cudagraph_entries.items():
            if entry.cudagraph is not None:
                found[key].add(batch.num_tokens)
    return {name: tuple(sorted(sizes)) for name, sizes in found.items()}
