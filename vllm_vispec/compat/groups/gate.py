"""Places in vLLM that the gate of compressors touches: states and ends of prompts."""

from vllm_vispec.compat.patch_point import PatchPoint

GATE_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.self.hidden_states",
        (),
        "reads",
        "V1, gated compressors: the target's state of the last prompt token",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.self.num_prompt_tokens",
        (),
        "reads",
        "V1, gated compressors: where a prompt ends",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState.add_request",
        ("req_index", "new_req_data"),
        "wraps",
        "V2, gated compressors: where a prompt ends (one object only)",
    ),
    PatchPoint(
        "vllm.v1.core.sched.output",
        "NewRequestData.prompt_len",
        (),
        "reads",
        "V2, gated compressors: where a prompt ends",
    ),
)
