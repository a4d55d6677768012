"""What `vispec bench profile` touches in vLLM; checked when its engines start."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V1_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"

_COMMON = (
    PatchPoint(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.step",
        (),
        "wraps",
        "a round, all of it",
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

_V1 = (
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        "wraps",
        "the batch",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner._sample",
        ("logits",),
        "wraps",
        "verification and sampling",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.get_model",
        (),
        "calls",
        "the target",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.drafter",
        (),
        "reads",
        "what drafts",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.propose",
        (),
        "wraps",
        "all of drafting",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._sample_draft_tokens",
        ("hidden_states",),
        "wraps",
        "draft sampling",
    ),
)

_V2 = (
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        "wraps",
        "the batch",
    ),
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.sample",
        ("hidden_states",),
        "wraps",
        "verification",
    ),
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.get_model",
        (),
        "calls",
        "the target",
    ),
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.self.speculator",
        (),
        "reads",
        "what drafts",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator",
        "TargetDependentARSpeculator.propose",
        (),
        "wraps",
        "all of drafting",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "DraftModelSpeculator.sample_draft",
        ("hidden_states",),
        "wraps",
        "draft sampling",
    ),
)

PROFILE = PatchGroup(
    name="profile",
    feature="vispec bench profile",
    remedy="",
    common=_COMMON,
    v1=_V1,
    v2=_V2,
)
