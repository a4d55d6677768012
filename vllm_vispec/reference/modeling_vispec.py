"""The ViSpec draft in plain PyTorch: the definition the engine is tested against, and what trains.

Sections cited are those of docs/reference-semantics.md. Tensor names end in their shape: B batch,
L prompt tokens (= rows before compression), N rows, M keys (cache included), T tokens of an image,
D hidden, Q adaptor queries, R image runs, A compressed image tokens, V vocabulary, G key/value
heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.turns import prompt_key_bias
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference.draft import Chain, ChainBuilder, Draft
from vllm_vispec.reference.layers import (
    DecoderLayer,
    ImageAdaptor,
    KVCache,
    RMSNorm,
    biased_mask,
)
from vllm_vispec.reference.rows import RowPlan, Run, plan_rows


@dataclass(frozen=True)
class Prefill:
    """State of one sequence after its prompt.

    Attributes:
        plan: the compact rows.
        adaptor_RQD: adaptor output of every run.
        global_D: global feature of all later rows (zeros without an image).
        layer_in_ND: input rows of the decoder layer.
        out_ND: output rows; the last one feeds lm_head and the next step.
        cache: keys and values of the compact rows, each [1, G, N, K].
        key_bias_N: what later rows add to the scores of these keys by the gate's decision; None
            for a head without a gate.
    """

    plan: RowPlan
    adaptor_RQD: Tensor
    global_D: Tensor
    layer_in_ND: Tensor
    out_ND: Tensor
    cache: KVCache
    key_bias_N: Tensor | None = None


class ViSpecDraft(Draft):
    """A head on the target's hidden states."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, size) if config.has_embed_tokens else None
        )
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.img_fc = (
            nn.Linear(2 * size, size, bias=config.fc_bias) if config.global_feature else None
        )
        self.img_adaptor = ImageAdaptor(config) if config.has_adaptor else None
        self.layer = DecoderLayer(config)
        self.norm = RMSNorm(size, config.rms_norm_eps) if config.final_norm else None
        self.compressor = (
            ImageCompressor(
                config.compressor_spec, size, config.num_attention_heads, config.qkv_bias
            )
            if config.has_compressor
            else None
        )
        if self.img_fc is not None:
            self._init_img_fc(self.img_fc)

    @torch.no_grad()
    def _init_img_fc(self, img_fc: nn.Linear) -> None:
        """[I | 0]: an untrained head passes the hidden state on and ignores images."""
        nn.init.eye_(img_fc.weight[:, : self.config.hidden_size])
        img_fc.weight[:, self.config.hidden_size :].zero_()
        if img_fc.bias is not None:
            img_fc.bias.zero_()

    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """Return the target's lm_head (section 4.6), see `Draft.output_head`."""
        return target_VD

    def distinct_passes(self, passes: int) -> int:
        """Return all of them: each pass reads the states of the one before."""
        return passes

    def adaptor(self, image_TD: Tensor) -> Tensor:
        """Embeddings of one run [T, D] -> [Q, D]; the last row is the global feature (4.3)."""
        return self.adaptor_rows([image_TD])[0]

    def adaptor_rows(self, images: Sequence[Tensor]) -> Tensor:
        """Embeddings of runs, each [T, D] with its own T -> [R, Q, D]; zeros without an adaptor."""
        shape = (len(images), self.config.num_query_tokens, self.config.hidden_size)
        if self.img_adaptor is None or not images:
            return self.fc.weight.new_zeros(shape)
        return self.img_adaptor.of_images(images)

    def image_tokens(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings of images, each [T, D] -> decoder layer inputs of each, [tokens, D].

        ViSpec's adaptor rows but the last are layer inputs already (4.3), and so are MSD's image
        embeddings. Other compressors make embeddings that go through the embedding half of `fc`,
        without bias, hidden state or global feature.
        """
        if self.compressor is None:
            return list(self.adaptor_rows(images)[:, :-1])
        if not images:
            return []
        tokens = self.compressor(images)
        if self.compressor.spec.makes_layer_inputs:
            return tokens
        input_AD = F.linear(torch.cat(tokens), self.fc.weight[:, : self.config.hidden_size])
        return list(input_AD.split([len(one) for one in tokens]))

    def read_images(
        self, images: Sequence[Tensor], runs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the adaptor's rows [R, Q, D] of runs and the `image_tokens` of images.

        Args:
            images, runs: embeddings of `RowPlan.images` and `RowPlan.runs`, each [T, D]. ViSpec's
                adaptor is called once: for it both are the same.
        """
        adaptor_RQD = self.adaptor_rows(runs)
        if self.compressor is None:
            return adaptor_RQD, list(adaptor_RQD[:, :-1]) if images else []
        return adaptor_RQD, self.image_tokens(images)

    def plan(self, length: int, runs: Sequence[Run]) -> RowPlan:
        """Lay out the compact rows of a prompt of `length` tokens with images at `runs`."""
        config = self.config
        return plan_rows(
            length,
            runs,
            config.num_query_tokens,
            compress=config.compress,
            compressor=config.compressor_spec,
        )

    def layer_input(self, embeds_ND: Tensor, hidden_ND: Tensor, global_ND: Tensor) -> Tensor:
        """Fuse text rows [..., D] (4.5): f = img_fc([hidden, global]), x = fc([embedding, f]).

        In a head without a global feature f is the hidden state.
        """
        if self.img_fc is None:
            return self.fc(torch.cat((embeds_ND, hidden_ND), dim=-1))
        fused_ND = self.img_fc(torch.cat((hidden_ND, global_ND.expand_as(hidden_ND)), dim=-1))
        return self.fc(torch.cat((embeds_ND, fused_ND), dim=-1))

    def run_layer(
        self,
        x_BND: Tensor,
        positions_BN: Tensor,
        mask_BNM: Tensor | None = None,
        cache: KVCache | None = None,
        wanted_R: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Run the decoder layer and, if the head has one, the final norm.

        Args:
            mask_BNM, cache: see `Attention.forward`.
            wanted_R: see `DecoderLayer.feed_forward`.

        Returns:
            Output rows [B, N, D] and the cache including them.
        """
        out_BND, cache = self.layer(x_BND, positions_BN, mask_BNM, cache, wanted_R)
        return (out_BND if self.norm is None else self.norm(out_BND)), cache

    def prefill(
        self,
        prompt_embeds_LD: Tensor,
        next_embed_D: Tensor,
        hidden_LD: Tensor,
        runs: Sequence[Run] = (),
        answer_start: int | None = None,
    ) -> Prefill:
        """Draft prefill of one prompt.

        Args:
            prompt_embeds_LD: the TARGET's input embeddings, image features scattered in.
            next_embed_D: draft embedding of the first token the target sampled.
            hidden_LD: the target's hidden states after its final norm.
            runs: images [start, end) in prompt indices.
            answer_start: first answer token if the prompt holds a part of the answer, at least 1;
                a gate reads the state before it. None: the answer begins behind the prompt.
        """
        plan = self.plan(len(prompt_embeds_LD), runs)
        adaptor_RQD, tokens = self.read_images(
            [prompt_embeds_LD[a:b] for a, b in plan.images],
            [prompt_embeds_LD[a:b] for a, b in plan.runs],
        )
        # Row p pairs hidden state p with the embedding of token p + 1 (4.1).
        shifted_LD = torch.cat((prompt_embeds_LD[1:], next_embed_D[None]))
        layer_in_ND = self._compact_rows(plan, adaptor_RQD, tokens, shifted_LD, hidden_LD)
        positions_N = torch.tensor(plan.positions, device=hidden_LD.device)
        gate_row = (plan.length if answer_start is None else answer_start) - 1
        bias_N = prompt_key_bias(self.compressor, hidden_LD[gate_row], plan.branch_of_row)
        mask_1NN = biased_mask(bias_N, positions_N >= gate_row, len(positions_N))
        out_BND, cache = self.run_layer(layer_in_ND[None], positions_N[None], mask_1NN)
        global_D = adaptor_RQD[-1, -1] if plan.runs else torch.zeros_like(next_embed_D)
        return Prefill(plan, adaptor_RQD, global_D, layer_in_ND, out_BND[0], cache, bias_N)

    def _compact_rows(
        self,
        plan: RowPlan,
        adaptor_RQD: Tensor,
        tokens: Sequence[Tensor],
        shifted_LD: Tensor,
        hidden_LD: Tensor,
    ) -> Tensor:
        """Return the decoder layer input of the compact rows [N, D].

        All rows are fused as if they were text, then image rows are overwritten: no branch depends
        on row counts, and autograd sees only what is used.
        """
        device = hidden_LD.device
        index_N = torch.tensor(plan.positions, device=device)
        run_N = torch.tensor(plan.run_of_row, device=device)
        filler_N = torch.tensor(plan.filler_of_row([len(one) for one in tokens]), device=device)
        zero_D = torch.zeros_like(shifted_LD[:1])
        # Run -1, no image yet, finds the row of zeros behind the last run (4.4).
        globals_RD = torch.cat((adaptor_RQD[:, -1], zero_D))
        text_ND = self.layer_input(shifted_LD[index_N], hidden_LD[index_N], globals_RD[run_N])
        if not tokens:
            return text_ND
        image_ND = torch.cat((*tokens, zero_D))[filler_N]
        return torch.where(filler_N[:, None] >= 0, image_ND, text_ND)

    def step(
        self,
        embed_D: Tensor,
        hidden_D: Tensor,
        global_D: Tensor,
        position: int,
        cache: KVCache,
        key_bias_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, KVCache]:
        """Run one row behind the cache: `extend` without the row axis."""
        out_ND, layer_in_ND, cache = self.extend(
            embed_D[None], hidden_D[None], global_D, position, cache, key_bias_N
        )
        return out_ND[0], layer_in_ND[0], cache

    def extend(
        self,
        embeds_ND: Tensor,
        hidden_ND: Tensor,
        global_D: Tensor,
        first_position: int,
        cache: KVCache,
        key_bias_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, KVCache]:
        """Run consecutive rows behind the cache: the catch-up on verified tokens (4.10).

        Args:
            key_bias_N: the prefill's, of the first keys of the cache.

        Returns:
            Output rows [N, D], layer input [N, D], and the cache including them.
        """
        layer_in_ND = self.layer_input(embeds_ND, hidden_ND, global_D)
        positions_N = torch.arange(len(embeds_ND), device=embeds_ND.device) + first_position
        all_N = torch.ones_like(positions_N, dtype=torch.bool)
        mask_1NM = biased_mask(key_bias_N, all_N, cache[0].shape[2] + len(embeds_ND))
        out_BND, cache = self.run_layer(layer_in_ND[None], positions_N[None], mask_1NM, cache)
        return out_BND[0], layer_in_ND, cache

    @torch.no_grad()
    def chain(
        self,
        prefill: Prefill,
        num_tokens: int,
        lm_head_VD: Tensor,
        embed_VD: Tensor | None = None,
    ) -> Chain:
        """Draft `num_tokens` tokens greedily from the end of a prompt.

        Args:
            lm_head_VD: the target's lm_head.
            embed_VD: the target's embedding table, needed if the head has none of its own.
        """
        table_VD = embed_VD if self.embed_tokens is None else self.embed_tokens.weight
        if table_VD is None:
            raise ValueError("the head has no embed_tokens: pass the target's table as embed_VD")
        hidden_D, layer_in_D, cache = prefill.out_ND[-1], prefill.layer_in_ND[-1], prefill.cache
        # Positions go on at the uncompressed length (4.7).
        last = prefill.plan.length - 1
        chain = ChainBuilder(last, lm_head_VD)
        token = chain.add(hidden_D, layer_in_D)
        for position in range(last + 1, last + num_tokens):
            hidden_D, layer_in_D, cache = self.step(
                table_VD[token], hidden_D, prefill.global_D, position, cache, prefill.key_bias_N
            )
            token = chain.add(hidden_D, layer_in_D)
        return chain.build()
