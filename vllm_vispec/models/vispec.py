"""The ViSpec draft as a vLLM model.

vLLM's registry names this class lazily and fingerprints this file, so it stays small.  Only the
layer input differs from vLLM's own EAGLE draft; sharing of embeddings and lm_head, the logits and
the decoder layer are vLLM's.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    get_draft_quant_config,
    maybe_prefix,
)
from vllm.platforms import current_platform

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.gated import (
    DECISIONS_PER_REQUEST,
    GatedAttention,
    GatedRowTable,
)
from vllm_vispec.config import ViSpecConfig
from vllm_vispec.draft_vocab.model import DraftLogits
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.families import embedding_scale
from vllm_vispec.heads.formats import get_format
from vllm_vispec.models.attention import MaskedAttention
from vllm_vispec.spec_decode.adaptor import ImageAdaptor, TextFusion
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import RowIds
from vllm_vispec.utils.logs import get_logger

# Without the setting the table of images takes no more than either.
_MAX_IMAGES = 1024
_MAX_TABLE_BYTES = 384 * 2**20

logger = get_logger(__name__)


class DraftRMSNorm(RMSNorm):
    """vLLM's norm; on CPU with vLLM's kernel, where vLLM 0.32 and 0.33 run a chain of torch ops.

    On the shipped pair that chain takes about 50 us a call: 1 % of decoding, 6 % of a draft step.
    With it the first pass would cost more than 1.10 of vLLM's EAGLE.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Norm ``[T, D]``; with a residual, norm the sum and return it too, both in place."""
        if not current_platform.is_cpu():
            return super().forward(x, residual)
        if residual is None:
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, self.weight, self.variance_epsilon)
            return out
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x, residual


class ScaledEmbedding(nn.Module):
    """A table of the target's whose rows are multiplied behind the look-up, as Gemma does."""

    def __init__(self, table: nn.Module, scale: float) -> None:
        super().__init__()
        self.table = table
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings ``[T, D]``."""
        return self.table(input_ids) * self.scale


def scale_shared_embedding(draft: Any, target: Any) -> None:
    """If a draft shares the target's table, multiply its rows as the target does, if it does.

    Args:
        draft: The draft as a vLLM model.
        target: vLLM's ``ModelConfig``.
    """
    scale = embedding_scale(target.hf_config.model_type, target.hf_text_config.hidden_size)
    if scale != 1.0 and not draft.has_own_embed_tokens:
        # Rounded as the target's is.
        rounded = float(torch.tensor(scale, dtype=target.dtype))
        draft.model.embed_tokens = ScaledEmbedding(draft.model.embed_tokens, rounded)


class DraftDecoderLayer(LlamaDecoderLayer):
    """vLLM's Llama layer with an attention of our choice and an optional input norm."""

    def __init__(
        self, vllm_config: VllmConfig, head: HeadConfig, attention: Callable[..., Any], prefix: str
    ):
        super().__init__(
            vllm_config,
            prefix=prefix,
            config=draft_hf_config(vllm_config),
            attn_layer_type=attention,
        )
        size, eps = head.hidden_size, head.rms_norm_eps
        self.input_layernorm = (
            DraftRMSNorm(size, eps=eps) if head.layer0_input_norm else nn.Identity()
        )
        self.post_attention_layernorm = DraftRMSNorm(size, eps=eps)

    def get_quant_config(self, vllm_config: VllmConfig) -> QuantizationConfig | None:
        """Use the draft's quantization, not the target's."""
        return get_draft_quant_config(vllm_config)


class DraftModel(nn.Module):
    """Embedding, fusion, row table and the one decoder layer; what all kinds of heads share."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_id: int = 0) -> None:
        super().__init__()
        self.config = draft_hf_config(vllm_config)
        head = HeadConfig.from_config_json(self.config.to_dict())
        self.head = head
        self.embed_tokens = VocabParallelEmbedding(
            head.vocab_size, head.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.rows = make_rows(
            head,
            ViSpecConfig.from_vllm(vllm_config).image_table_size,
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.scheduler_config.max_num_seqs,
        )
        self.fusion = TextFusion(head.hidden_size)
        self.adaptor = ImageAdaptor(head) if head.has_adaptor else None
        self.compressor = make_compressor(head)
        layer_prefix = maybe_prefix(prefix, f"layers.{layer_id}")
        layer = DraftDecoderLayer(vllm_config, head, self.attention_factory(), layer_prefix)
        self.layers = nn.ModuleList([layer])
        self.norm = (
            DraftRMSNorm(head.hidden_size, eps=head.rms_norm_eps) if head.final_norm else None
        )

    def attention_factory(self) -> Callable[..., Any]:
        """Return what builds the layer's attention; by default vLLM's own."""
        from vllm.model_executor.models.llama import LlamaAttention

        return LlamaAttention

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings ``[T, D]``."""
        return self.embed_tokens(input_ids)

    def run(
        self, embeddings: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one draft pass given the tokens' embeddings ``[T, D]``."""
        hidden_states = self.rows.layer_input(self.fusion.fuse(embeddings, hidden_states))
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states = hidden_states + residual
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return hidden_states, hidden_states


def make_rows(
    head: HeadConfig, max_images: int | None, max_num_tokens: int, max_num_requests: int
) -> RowTable:
    """Return the row table that a head needs.

    Args:
        head: The head.
        max_images: Images it holds; None: the default, fewer where they would take much memory.
        max_num_tokens: Longest batch.
        max_num_requests: Most requests at once.
    """
    if max_images is None:
        max_images = _default_images(head)
    spec = head.compressor_spec
    num_branches = len(spec.primitives) if spec.gated else 1
    num_slots = max_images + 1 if head.has_adaptor else 1
    ids = RowIds(num_slots, head.num_query_tokens, num_branches if head.has_compressor else 0)
    if head.has_compressor and spec.gated:
        num_decisions = DECISIONS_PER_REQUEST * max_num_requests + 1
        return GatedRowTable(ids, head.hidden_size, max_num_tokens, num_decisions)
    return RowTable(ids, head.hidden_size, max_num_tokens)


def _default_images(head: HeadConfig) -> int:
    bytes_of_image = head.num_query_tokens * head.hidden_size * torch.get_default_dtype().itemsize
    count = min(_MAX_IMAGES, max(1, _MAX_TABLE_BYTES // bytes_of_image))
    if head.has_adaptor and count < _MAX_IMAGES:
        logger.info(
            "ViSpec: the device keeps the adaptor's output of %d images, %.1f MiB each; set "
            "`image_table_size` in the speculative config for another number",
            count,
            bytes_of_image / 2**20,
        )
    return count


def make_compressor(head: HeadConfig) -> ImageCompressor | None:
    """Return the compressor of a head that has one; the same on every tensor-parallel rank."""
    if not head.has_compressor:
        return None
    spec, size = head.compressor_spec, head.hidden_size
    compressor = ImageCompressor(spec, size, head.num_attention_heads, head.qkv_bias)
    return compressor.requires_grad_(False)


@support_torch_compile
class ViSpecModel(DraftModel):
    """The draft of heads that compress images: adaptor rows, and masked positions."""

    def attention_factory(self) -> Callable[..., Any]:
        """Return the attention that hides masked positions, and heeds the gate if there is one."""
        if isinstance(self.rows, GatedRowTable):
            return partial(GatedAttention, rows=self.rows)
        return partial(MaskedAttention, rows=self.rows)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one draft pass; returns the hidden states for lm_head and for the next step."""
        return self.run(self.embed_tokens(input_ids), positions, hidden_states)


class EagleViSpecForCausalLM(DraftLogits, EagleLlamaForCausalLM):
    """Registered architecture; the prefix ``Eagle`` keeps vLLM's configuration from renaming it."""

    model_class: type[DraftModel] = ViSpecModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = draft_hf_config(vllm_config)
        self.vispec_config = ViSpecConfig.from_vllm(vllm_config)
        self.model = self.model_class(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        # Read by vLLM when it decides what to share with the target.
        self.has_own_embed_tokens = False
        self.has_own_lm_head = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a head of any checkpoint format."""
        names = get_format(self.vispec_config.checkpoint_format)
        canonical: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            canonical_name = names.canonical_name(name)
            if canonical_name is not None:
                canonical[canonical_name] = tensor
        fusion_names = [name for name in canonical if name.startswith(("fc.", "img_fc."))]
        self.model.fusion.load({name: canonical.pop(name) for name in fusion_names})
        canonical |= self.attention_weights(canonical)
        self.has_own_embed_tokens = "embed_tokens.weight" in canonical
        AutoWeightsLoader(self.model).load_weights(canonical.items(), mapper=CANONICAL_TO_VLLM)
        # Text before the first image sees a global feature of zeros.
        no_image_D = torch.zeros_like(self.model.fusion.bias)
        self.model.rows.write_image(0, self.model.fusion.offset(no_image_D))
        if self.model.adaptor is not None:
            self.model.adaptor.fold_queries()

    def attention_weights(self, canonical: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights whose form the layer's attention changes; here, padded heads."""
        prefix = "layer.self_attn."
        weights = {k[len(prefix) :]: v for k, v in canonical.items() if k.startswith(prefix)}
        padded = self.model.layers[0].self_attn.pad_weights(weights)
        return {prefix + name: weight for name, weight in padded.items()}


CANONICAL_TO_VLLM = WeightsMapper(
    orig_to_new_prefix={"layer.": "layers.0.", "img_adaptor.": "adaptor."},
    # Qualified, since the adaptor has projections of the same names.
    orig_to_new_stacked={
        ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
        ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
        ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    },
)


def draft_hf_config(vllm_config: VllmConfig) -> Any:
    """Return the draft's transformers configuration."""
    assert vllm_config.speculative_config is not None
    return vllm_config.speculative_config.draft_model_config.hf_config
