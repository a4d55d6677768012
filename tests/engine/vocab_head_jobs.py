"""Child-process job: a draft's own lm_head among tensor-parallel ranks, without an engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

VOCAB, HIDDEN, TOKENS = 1000, 16, 7
IDS = [token for token in range(VOCAB) if token % 7 in (1, 2, 5)]


def check(rank: int, world: int, port: int, folder: str) -> dict[str, Any]:
    """Build a draft around a known lm_head, take rows out of it, and compare with plain torch."""
    os.environ["VLLM_DIST_IDENT"] = f"vocab-{port}"
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    from vllm_vispec.draft_vocab.model import give_own_lm_head

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo"
        )
        parallel_state.initialize_model_parallel(world, 1)
        generator = torch.Generator().manual_seed(0)
        weight_VD = torch.randn(VOCAB, HIDDEN, generator=generator)
        states_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
        draft = _draft(weight_VD, Path(folder) / f"ids-{rank}.json")
        give_own_lm_head(draft, Path(folder))
        found = _compare(draft, states_TD, states_TD @ weight_VD.T)
        parallel_state.destroy_model_parallel()
    return found | {"rows": draft.lm_head.weight.shape[0]}


def _draft(weight_VD: torch.Tensor, file: Path) -> Any:
    from transformers import LlamaConfig
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM

    from vllm_vispec.config import ViSpecConfig
    from vllm_vispec.draft_vocab.model import DraftLogits

    class Draft(DraftLogits, EagleLlamaForCausalLM):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    file.write_text(json.dumps(IDS[::-1]))
    draft = Draft()
    draft.vispec_config = ViSpecConfig(draft_vocab=str(file), draft_vocab_file=str(file))
    draft.config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_attention_heads=4)
    draft.logits_processor = LogitsProcessor(VOCAB)
    draft.lm_head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=torch.float32)
    draft.lm_head.weight_loader(draft.lm_head.weight, weight_VD)
    draft.lm_head.quant_method.process_weights_after_loading(draft.lm_head)
    return draft


def _compare(draft: Any, states_TD: torch.Tensor, logits_TV: torch.Tensor) -> dict[str, Any]:
    wanted_TV = torch.full_like(logits_TV, float("-inf"))
    wanted_TV[:, IDS] = logits_TV[:, IDS]
    logits = draft.compute_logits(states_TD)
    return {
        "top": draft.get_top_tokens(states_TD).tolist(),
        "v1": _chosen_by_v1(draft, states_TD),
        "v2": _chosen_by_v2(draft, states_TD),
        "wanted": wanted_TV.argmax(-1).tolist(),
        "unlisted_win": bool((logits_TV.argmax(-1) != wanted_TV.argmax(-1)).any()),
        "same_logits": bool(torch.allclose(logits, wanted_TV, atol=1e-5)),
    }


def _chosen_by_v1(draft: Any, states_TD: torch.Tensor) -> list[int]:
    """vLLM's own code of the V1 proposer on a stand-in for it."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    proposer: Any = SimpleNamespace(model=draft, use_local_argmax_reduction=True)
    chosen: list[int] = SpecDecodeBaseProposer._greedy_sample(proposer, states_TD).tolist()
    return chosen


def _chosen_by_v2(draft: Any, states_TD: torch.Tensor) -> list[int]:
    """vLLM's own code of the V2 speculator on a stand-in for it."""
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator as Speculator

    self: Any = SimpleNamespace(model=draft, use_local_argmax_reduction=True)
    self.get_draft_top_tokens = lambda *args: Speculator.get_draft_top_tokens(self, *args)
    unused = torch.zeros(0)
    chosen: list[int] = Speculator.sample_draft(
        self, states_TD, unused, unused, unused, unused, unused, None
    ).tolist()
    return chosen
