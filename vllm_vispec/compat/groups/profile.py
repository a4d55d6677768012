"""Where `vispec bench profile` touches vLLM.

Not part of `compat.table`, which every process that serves checks: a vLLM whose rounds cannot be
split can still serve.
"""

from vllm_vispec.compat.patch_point import PatchPoint

_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
_V1_DRAFT = "vllm.v1.spec_decode.llm_base_proposer"
_V2_DRAFT = "vllm.v1.worker.gpu.spec_decode.speculator"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"

PROFILE_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint("vllm.v1.engine.llm_engine", "LLMEngine.step", (), "wraps", "a round, all of it"),
    PatchPoint(
        _V1, "GPUModelRunner.execute_model", ("scheduler_output",), "wraps", "V1: the batch"
    ),
    PatchPoint(
        _V1, "GPUModelRunner._sample", ("logits",), "wraps", "V1: verification and sampling"
    ),
    PatchPoint(_V1, "GPUModelRunner.get_model", (), "calls", "V1: the target"),
    PatchPoint(_V1, "GPUModelRunner.self.drafter", (), "reads", "V1: what drafts"),
    PatchPoint(_V1_DRAFT, "SpecDecodeBaseProposer.propose", (), "wraps", "V1: all of drafting"),
    PatchPoint(
        _V1_DRAFT,
        "SpecDecodeBaseProposer._sample_draft_tokens",
        ("hidden_states",),
        "wraps",
        "V1: draft sampling",
    ),
    PatchPoint(
        _V2, "GPUModelRunner.execute_model", ("scheduler_output",), "wraps", "V2: the batch"
    ),
    PatchPoint(_V2, "GPUModelRunner.sample", ("hidden_states",), "wraps", "V2: verification"),
    PatchPoint(_V2, "GPUModelRunner.get_model", (), "calls", "V2: the target"),
    PatchPoint(_V2, "GPUModelRunner.self.speculator", (), "reads", "V2: what drafts"),
    PatchPoint(_V2_AR, "TargetDependentARSpeculator.propose", (), "wraps", "V2: all of drafting"),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.sample_draft",
        ("hidden_states",),
        "wraps",
        "V2: draft sampling",
    ),
    PatchPoint(
        "vllm.v1.core.sched.output",
        "NewRequestData.num_computed_tokens",
        (),
        "reads",
        "whether a prompt is whole",
    ),
    PatchPoint(
        "vllm.multimodal.inputs",
        "PlaceholderRange.get_num_embeds",
        (),
        "calls",
        "image tokens of a prompt",
    ),
)
