"""What the gate of compressors touches in vLLM: states and ends of prompts."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_V1 = (
    PatchPoint(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.self.hidden_states",
        (),
        "reads",
        "the target's state of the last prompt token",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.self.num_prompt_tokens",
        (),
        "reads",
        "where a prompt ends",
    ),
)

_V2 = (
    PatchPoint(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState.add_request",
        ("req_index", "new_req_data"),
        "wraps",
        "where a prompt ends (one object only)",
    ),
    PatchPoint(
        "vllm.v1.core.sched.output",
        "NewRequestData.prompt_len",
        (),
        "reads",
        "where a prompt ends",
    ),
)

GATE = PatchGroup(
    name="gate",
    feature="compressors with a gate",
    remedy="use a head without a gate",
    v1=_V1,
    v2=_V2,
)
