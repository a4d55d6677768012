"""What every ViSpec engine touches in vLLM; checked when the plugin loads."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_ARGS = "vllm.engine.arg_utils"
_CONFIG = "vllm.transformers_utils.config"
_LLAMA = "vllm.model_executor.models.llama"

_COMMON = (
    PatchPoint(
        _ARGS,
        "EngineArgs.create_speculative_config",
        ("target_model_config", "target_parallel_config"),
        "wraps",
        'accepts "method": "vispec", checks the head against the target',
    ),
    PatchPoint(
        _ARGS,
        "EngineArgs.create_engine_config",
        ("usage_context",),
        "wraps",
        "checks what only the finished configuration tells, before any other process starts",
    ),
    PatchPoint(
        "vllm.config.speculative",
        "SpeculativeMethod",
        (),
        "reads",
        'lists the methods, "vispec" among them, where one is misspelt',
    ),
    PatchPoint(
        _CONFIG,
        "HFConfigParser.parse",
        ("model", "trust_remote_code", "revision"),
        "wraps",
        "returns the head's configuration as a plain LlamaConfig; only while a head is read",
    ),
    PatchPoint(
        "vllm.v1.worker.worker_base",
        "WorkerBase.__init__",
        ("vllm_config",),
        "wraps",
        "first moment in a worker at which the configuration is known and no runner exists",
    ),
    PatchPoint(
        "vllm.multimodal.inputs",
        "PlaceholderRange.extract_embeds_range",
        (),
        "calls",
        "which prompt positions hold vision embeddings",
    ),
    PatchPoint(
        _LLAMA,
        "LlamaDecoderLayer.__init__",
        ("vllm_config", "prefix", "config", "attn_layer_type"),
        "subclasses",
        "the draft's decoder layer takes our attention",
    ),
    PatchPoint(
        "vllm.model_executor.models.llama_eagle",
        "EagleLlamaForCausalLM.forward",
        ("input_ids", "positions", "hidden_states"),
        "subclasses",
        "the draft model's interface",
    ),
    PatchPoint(
        _LLAMA,
        "LlamaForCausalLM.compute_logits",
        ("hidden_states",),
        "overrides",
        "logits of the draft; those of its own tokens where it has a vocabulary of its own",
    ),
    PatchPoint(
        "vllm.utils.torch_utils",
        "async_tensor_h2d",
        ("data", "device", "dtype"),
        "calls",
        "uploads that nothing waits for, from pinned memory where the platform has it",
    ),
    PatchPoint(
        "vllm.utils.torch_utils",
        "np_to_pinned_tensor",
        ("array",),
        "calls",
        "row codes in pinned memory where the platform has it",
    ),
    PatchPoint(
        "vllm.config.kv_transfer",
        "KVTransferConfig.is_kv_consumer",
        (),
        "reads",
        "whether prompts may come without their images' features, which one line says at start",
    ),
)

CORE = PatchGroup(
    name="core",
    feature="ViSpec",
    remedy="",
    common=_COMMON,
)
