"""A published model as a draft outside the engine: its acceptance as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine import StartProcess
from tests.support.runners import marks
from tests.support.tiny_store import TinyStore
from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.evaluate.run import evaluate
from vllm_vispec.train.target import load_model, model_inputs
from vllm_vispec.utils.errors import ViSpecError


def greedy_answers(target: Path, dialogues: Path, max_tokens: int = 16) -> Path:
    """Write the dialogues with the target's own greedy answers, computed by transformers."""
    file = dialogues.parent / f"answers-{target.name}.jsonl"
    if file.is_file():
        return file
    processor, model = load_processor(target), load_model(target, torch.float32)
    encoder = Encoder(processor, image_root=dialogues.parent)
    lines = []
    records = map(json.loads, dialogues.read_text().splitlines())
    for record, conversation in zip(records, read_conversations(dialogues), strict=True):
        assert isinstance(conversation, Conversation)
        encoded = encoder(conversation)
        assert isinstance(encoded, Encoded)
        prompt_L = encoded.token_ids[: int(encoded.answer.long().argmax())]
        inputs = model_inputs(model, prompt_L[None], [len(prompt_L)], encoded.vision)
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        answer = ids[0, len(prompt_L) :].tolist()
        record["messages"][-1]["content"] = processor.tokenizer.decode(answer)
        lines.append(json.dumps(record | {"response_token_ids": [answer]}) + "\n")
    file.write_text("".join(lines))
    return file


def _evaluate(options: dict[str, Any]) -> dict[str, Any]:
    return evaluate(EvalOptions(**options)).to_json()


@pytest.mark.parametrize(
    ("runner", "kind"),
    [
        pytest.param(runner, kind, marks=marks(runner, slow))
        for runner, kind, slow in (
            ("v1", "qwen2_5_vl", False),
            ("v1", "llava_next", True),
            ("v2", "qwen3_vl", True),
        )
    ],
)
def test_the_simulation_is_what_the_engine_does(
    child: StartProcess, tiny: TinyStore, dialogues: Path, runner: str, kind: str
) -> None:
    target, sibling = tiny.target(kind), tiny.sibling(kind)
    options = {
        "target": str(target),
        "head": sibling,
        "data": greedy_answers(target, dialogues),
        "num_speculative_tokens": 3,
        "dtype": "float32",
        "check_greedy": True,
        "engine": True,
        "engine_args": {"num_gpu_blocks_override": 512, "max_num_seqs": 8},
        "device": "cpu",
    }
    found = child(runner).call(_evaluate, options)
    assert (found["samples"], found["rejected"]) == (24, [])
    assert found["greedy_share"] == 1
    assert found["engine"]["answers_identical_to_data"] == 24
    assert found["simulated"] == found["engine"]["families"]
    assert {*found["simulated"]} == {"chat", "pictures", "overall"}
    assert found["simulated"]["pictures"]["mean_accepted_tokens"] > 0.1


def test_what_a_published_model_does_not_have_is_refused(tiny: TinyStore, dialogues: Path) -> None:
    options: dict[str, Any] = {"target": str(tiny.target()), "head": tiny.sibling()}
    options["data"] = dialogues
    with pytest.raises(ViSpecError, match="--draft-vocab does not go with a published model"):
        evaluate(EvalOptions(**options, draft_vocab="100"))
    with pytest.raises(ViSpecError, match="family llava, the target of qwen2_5_vl"):
        evaluate(EvalOptions(**options | {"head": tiny.sibling("llava")}))
