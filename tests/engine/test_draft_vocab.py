"""A draft with a vocabulary of its own: outputs are the target's, drafts are of that vocabulary."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.child import Child
from tests.support.engine import Engine
from tests.support.operators import Record
from tests.support.runners import RUNNERS, runners
from tests.support.spies import drafter, watch_drafts
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, Served, mixed_requests, serve_requests, words
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_draft_tokens": 4}
FEW = [token for token in range(VOCAB) if token % 3]
SHUFFLED = [(token * 7) % VOCAB for token in range(VOCAB)]
REQUESTS = mixed_requests(KIND, 8, 20)
# At temperature 1 drafts may be sampled.
SAMPLED = [Request(f"sampled-{i}", words(i, 12), (), 12, {"temperature": 1.0}) for i in range(4)]


@dataclass(frozen=True)
class Drafted:
    """What an engine answered and drafted.

    Attributes:
        tokens: Every token that was drafted.
        watched: The methods that chose them; ``violations`` what a captured graph could not do.
    """

    served: Served
    tokens: set[int]
    watched: list[str]
    violations: list[str]
    lm_head_rows: int


def _configs(tiny: TinyStore, head: str) -> dict[str, dict[str, Any]]:
    """Return speculative settings by name; the head's folder gets a list of its own."""
    everything, few = tiny.root / "all.json", tiny.root / "few.json"
    everything.write_text(json.dumps(SHUFFLED))
    few.write_text(json.dumps({"token_ids": FEW}))
    write_vocab(Path(head) / DRAFT_VOCAB, SHUFFLED)
    return {
        "whole": {},
        "all": {"draft_vocab": str(everything)},
        "few": {"draft_vocab": str(few)},
        "first": {"draft_vocab": 200},
        "logits": {"draft_vocab": str(few), "draft_sample_method": "probabilistic"},
    }


@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v1", "v2"]))
def test_draft_vocab(engine: Callable[..., Engine], tiny: TinyStore, runner: str) -> None:
    # A head of its own: a list in the folder of others' would be theirs, too.
    head = tiny.head(seed=77)
    configs = _configs(tiny, head)
    if runner == "v2":
        # Triton's interpreter refuses a mask in vLLM's kernel that samples drafts.
        del configs["logits"]
    plain = engine(runner, **OPTIONS).once(serve_requests, REQUESTS)
    found: dict[str, Drafted] = {
        name: engine(runner, **OPTIONS, draft=head, config=config).run(_serve)
        for name, config in configs.items()
    }
    for name, drafted in found.items():
        assert drafted.served.outputs() == plain.outputs(), name
        assert drafted.served.acceptance() > 0, name
    whole, few, first = found["whole"], found["few"], found["first"]
    # A list of all tokens changes no draft, fewer are accepted less often.
    assert found["all"].served.accepted() == whole.served.accepted()
    assert found["all"].tokens
    assert few.served.acceptance() < 0.8 * whole.served.acceptance()
    # Only tokens of the list are drafted.
    assert not whole.tokens <= set(FEW)
    assert few.tokens <= set(FEW)
    assert first.tokens <= set(SHUFFLED[:200])
    # The lm_head is as small as the list, up to vLLM's padding of 64 rows.
    assert whole.lm_head_rows >= VOCAB
    assert len(FEW) <= few.lm_head_rows < len(FEW) + 64
    assert first.lm_head_rows == 256
    # The choice reads nothing back; logits are scattered only where drafts are sampled.
    assert few.watched == ["get_top_tokens"]
    assert few.violations == []
    if "logits" in found:
        assert found["logits"].tokens <= set(FEW)
        assert "compute_logits" in found["logits"].watched
        assert found["logits"].violations == []


@pytest.mark.slow
def test_two_workers_draft_like_one(engine: Callable[..., Engine], tiny: TinyStore) -> None:
    """Each of the tensor-parallel workers has half of the draft's lm_head."""
    head = tiny.head(seed=77)
    options = {**OPTIONS, "draft": head, "config": _configs(tiny, head)["few"]}
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    one = engine("v1", **options).run(serve_requests, REQUESTS)
    two = engine("v1", process="two", **options, extra=parallel).run(serve_requests, REQUESTS)
    assert two.accepted() == one.accepted()
    assert two.acceptance() > 0
    assert two.outputs() == one.outputs()


def _serve(llm: LLM) -> Drafted:
    """Serve and note the drafted tokens and the operators of the draft's choice of them."""
    record, model = Record(), drafter(llm).model

    def watched(name: str, call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record.watching(name):
                return call(*args, **kwargs)

        return wrapped

    for name in ("get_top_tokens", "compute_logits"):
        setattr(model, name, watched(name, getattr(model, name)))
    with watch_drafts(llm) as drafts:
        served = serve_requests(llm, REQUESTS)
        serve_requests(llm, SAMPLED)
    tokens = {token for step in drafts for row in step for token in row}
    rows = int(model.lm_head.weight.shape[0])
    return Drafted(served, tokens, sorted(record.passes), sorted(set(record.violations)), rows)


# The draft's own lm_head without an engine, on one and on two ranks, as both runners ask it.

HEAD_VOCAB, HIDDEN, TOKENS = 1000, 16, 7
IDS = [token for token in range(HEAD_VOCAB) if token % 7 in (1, 2, 5)]


@pytest.mark.parametrize(
    ("world", "runner", "rows"),
    [
        (1, "v1", 448),
        pytest.param(1, "v1-overlay", 448, marks=pytest.mark.overlay),
        pytest.param(2, "v1", 224, marks=pytest.mark.slow),
    ],
)
def test_every_rank_chooses_what_one_would(
    tmp_path: Path, world: int, runner: str, rows: int
) -> None:
    """Rows are spread over ranks and padded by vLLM to a multiple of 64."""
    assert len(IDS) <= 448
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = [Child(RUNNERS[runner].env()) for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        answers = pool.map(
            lambda rank: children[rank].call(_choose, rank, world, port, tmp_path), range(world)
        )
        for answer in answers:
            assert answer["unlisted_win"]
            assert answer["top"] == answer["v1"] == answer["v2"] == answer["wanted"]
            assert answer["same_logits"]
            assert answer["rows"] == rows
    for child in children:
        child.close()


def _choose(rank: int, world: int, port: int, folder: Path) -> dict[str, Any]:
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
        weight_VD = torch.randn(HEAD_VOCAB, HIDDEN, generator=generator)
        states_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
        draft = _draft(weight_VD, folder / f"ids-{rank}.json")
        give_own_lm_head(draft, folder)
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
    draft.vispec_config = ViSpecConfig(draft_vocab=str(file))
    draft.config = LlamaConfig(vocab_size=HEAD_VOCAB, hidden_size=HIDDEN, num_attention_heads=4)
    draft.logits_processor = LogitsProcessor(HEAD_VOCAB)
    draft.lm_head = ParallelLMHead(HEAD_VOCAB, HIDDEN, params_dtype=torch.float32)
    draft.lm_head.weight_loader(draft.lm_head.weight, weight_VD)
    draft.lm_head.quant_method.process_weights_after_loading(draft.lm_head)
    return draft


def _compare(draft: Any, states_TD: torch.Tensor, logits_TV: torch.Tensor) -> dict[str, Any]:
    """Compare with plain torch, and with vLLM's own code of both runners on stand-ins for them."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator as Speculator

    runner: Any = SimpleNamespace(model=draft, use_local_argmax_reduction=True)
    runner.get_draft_top_tokens = lambda *args: Speculator.get_draft_top_tokens(runner, *args)
    unused = torch.zeros(0)
    v2 = Speculator.sample_draft(runner, states_TD, *[unused] * 5, None)
    wanted_TV = torch.full_like(logits_TV, float("-inf"))
    wanted_TV[:, IDS] = logits_TV[:, IDS]
    logits = draft.compute_logits(states_TD)
    return {
        "top": draft.get_top_tokens(states_TD).tolist(),
        "v1": SpecDecodeBaseProposer._greedy_sample(runner, states_TD).tolist(),
        "v2": v2.tolist(),
        "wanted": wanted_TV.argmax(-1).tolist(),
        "unlisted_win": bool((logits_TV.argmax(-1) != wanted_TV.argmax(-1)).any()),
        "same_logits": bool(torch.allclose(logits, wanted_TV, atol=1e-5)),
    }
