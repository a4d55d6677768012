"""The child process of `vispec verify`, an engine or one attention backend, and vLLM's workers."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vllm_vispec.bench.profile_steps import EXECUTE, PROPOSE, Batch, Recorder, Span, wall_time
from vllm_vispec.compat.check import require
from vllm_vispec.compat.groups import groups_named
from vllm_vispec.plugin import register
from vllm_vispec.utils.errors import ViSpecError, first_line
from vllm_vispec.utils.process import serve_requests
from vllm_vispec.verify.prompts import PROMPTS
from vllm_vispec.verify.result import Acceptance, AttentionCase, AttentionError, EngineState, Layers

EXTENSION = "vllm_vispec.verify.worker.VerifyWorker"
TOP = 20
"""Logprobs that are kept; vLLM's default limit."""
FIRST_PASS_END = "first pass end"
_FIRST_PASS_ENDS = {"drafter": "_sample_draft_tokens", "speculator": "on_prefill_end"}
"""Where the V1 and the V2 runner keep what drafts, and what that calls right behind its first pass,
outside of any CUDA graph."""

Request = Mapping[str, Any]


class Child:
    """What the process has started; its methods are what can be requested."""

    llm: Any = None
    vllm_config: Any = None

    def start(self, request: Request) -> dict[str, Any]:
        """Start an engine with keyword arguments of `vllm.LLM`; return its `EngineState`."""
        from vllm import LLM

        self.llm = LLM(**request["engine"], worker_extension_cls=EXTENSION, disable_log_stats=False)
        state: dict[str, Any] = self.llm.collective_rpc("vispec_state")[0]
        runner: Any = state["runner"].lower()
        for group in (*groups_named("profile", runner), *groups_named("verify", runner)):
            require(group)
        return state

    def ask(self, request: Request) -> dict[str, Any]:
        """Answer prompts, by their places, together and greedily."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            logprobs=TOP if request["logprobs"] else None,
        )
        messages = [PROMPTS[place].messages() for place in request["prompts"]]
        outputs = [one.outputs[0] for one in self.llm.chat(messages, params, use_tqdm=False)]
        answers = [
            {
                "token_ids": list(output.token_ids),
                "top": [
                    {token: one.logprob for token, one in row.items()}
                    for row in output.logprobs or ()
                ],
            }
            for output in outputs
        ]
        return {"answers": answers}

    def acceptance(self, _: Request) -> dict[str, Any]:
        """Return vLLM's counters, an `Acceptance`."""
        metrics = {
            one.name.removeprefix("vllm:spec_decode_"): one for one in self.llm.get_metrics()
        }
        found = {name: metrics[name] for name in Acceptance.model_fields}
        return {
            name: one.values if name.endswith("per_pos") else one.value
            for name, one in found.items()
        }

    def watch(self, _: Request) -> dict[str, Any]:
        """Time what follows."""
        self.llm.collective_rpc("vispec_watch")
        return {}

    def timings(self, request: Request) -> dict[str, Any]:
        """Return medians, `EngineResult.timings`."""
        passes = request["num_draft_passes"]
        found: dict[str, Any] = self.llm.collective_rpc("vispec_timings", args=(passes,))[0]
        return found

    def configure(self, request: Request) -> dict[str, Any]:
        """Make the configuration of an engine without starting it."""
        import torch
        from vllm.engine.arg_utils import EngineArgs

        if torch.cpu._is_amx_tile_supported():
            # In an engine the model's products ask the kernel for these registers first.
            torch.cpu._init_amx()
        self.vllm_config = EngineArgs(**request["engine"]).create_engine_config()
        return {}

    def attention(self, request: Request) -> dict[str, Any]:
        """Return one backend's `AttentionError`; what it raises is its failure."""
        from vllm_vispec.verify.attention import check_attention

        case, backend = AttentionCase(**request["case"]), request["backend"]
        try:
            found = check_attention(self.vllm_config, case, backend)
        except Exception as error:
            traceback.print_exc()
            found = AttentionError(case=case, backend=backend, failure=first_line(error))
        return found.model_dump(mode="json")

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; an error becomes its one line."""
        try:
            found: dict[str, Any] = getattr(self, request["do"])(request)
        except Exception as error:
            traceback.print_exc()
            return {"error": first_line(error), "is_refusal": isinstance(error, ViSpecError)}
        return found


class VerifyWorker:
    """Methods of every worker of an engine that is verified, on both model runners.

    vLLM adds them to its workers (`worker_extension_cls`).
    """

    model_runner: Any
    vllm_config: Any

    def vispec_state(self) -> dict[str, Any]:
        """Return an `EngineState` as plain data."""
        from vllm.compilation.counter import compilation_counter
        from vllm.platforms import current_platform

        config, runner = self.vllm_config, self.model_runner
        drafts = (getattr(runner, name, None) for name in _FIRST_PASS_ENDS)
        draft = next((one for one in drafts if one is not None), None)
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
        ).model_dump(mode="json")

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
    from vllm.model_executor.layers.attention import Attention

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
    return tuple(kind.model_copy(update={"count": count}) for kind, count in found.items())


def _graphs(runner: Any, draft: Any) -> dict[str, tuple[int, ...]]:
    """Return sizes of the V2 runner's full graphs, and of those inside of vLLM's wrappers."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    found: defaultdict[str, set[int]] = defaultdict(set)
    for owner in (runner, draft):
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, CudaGraphManager):
                found[f"{name}, FULL"].update(batch.num_tokens for batch in value.graphs)
    for wrapper in CUDAGraphWrapper._all_instances:
        models = {"target": runner, "draft": draft}.items()
        owners = (name for name, one in models if getattr(one, "model", None) is wrapper)
        key = f"{next(owners, 'compiled pieces')}, {wrapper.runtime_mode.name}"
        entries = wrapper.concrete_cudagraph_entries.items()
        sizes = {batch.num_tokens for batch, entry in entries if entry.cudagraph is not None}
        found[key].update(sizes)
    return {name: tuple(sorted(sizes)) for name, sizes in found.items() if sizes}


def main() -> None:
    """Answer until stdin ends."""
    register()
    child = Child()
    serve_requests(child.reply)
    if child.llm is not None:
        child.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
