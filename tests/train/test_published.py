"""A published model as a draft outside the engine: its acceptance as it is, and trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tests.support.engine import StartProcess
from tests.support.runners import marks
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run
from vllm_vispec.config import read_images
from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation
from vllm_vispec.draft_model.named import find_published
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.evaluate.run import evaluate
from vllm_vispec.heads.export import Export, export_model
from vllm_vispec.reference import image_mask
from vllm_vispec.train.published import PublishedModel
from vllm_vispec.train.target import TrainingTarget, load_model, model_inputs, pad_batch
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag, parse


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
    ("runner", "kind", "draft"),
    [
        pytest.param(runner, kind, draft, marks=marks(runner, slow))
        for runner, kind, draft, slow in (
            ("v1", "qwen2_5_vl", "sibling", False),
            ("v1", "qwen2_5_vl", "trained", False),
            ("v1", "qwen2_5_vl", "none", False),
            ("v1", "llava_next", "prune:3", False),
            ("v1", "qwen2_5_vl", "prune:3", True),
            ("v1", "qwen3_vl", "pool:3", True),
            ("v1", "llava_next", "pool:4", True),
            ("v1", "qwen2_5_vl", "text model", True),
            ("v1", "llava_next", "sibling", True),
            ("v2", "qwen3_vl", "sibling", True),
        )
    ],
)
def test_the_simulation_is_what_the_engine_does(
    child: StartProcess,
    tiny: TinyStore,
    dialogues: Path,
    tmp_path: Path,
    runner: str,
    kind: str,
    draft: str,
) -> None:
    target, head = tiny.target(kind), tiny.sibling(kind)
    if draft == "trained":
        head = str(run(distil(tiny, dialogues, tmp_path, kind)).head)
    elif draft == "text model":
        head = tiny.text_model(kind)
    options = {
        "target": str(target),
        "head": head,
        "images": draft if ":" in draft or draft == "none" else None,
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
    with pytest.raises(ViSpecError, match="--images does not go with a head"):
        evaluate(EvalOptions(**options | {"head": tiny.head()}, images="none"))
    with pytest.raises(ViSpecError, match="--images prune:2 does not go with a text model"):
        evaluate(EvalOptions(**options | {"head": tiny.text_model()}, images="prune:2"))
    with pytest.raises(ViSpecError, match=r"--images 'max:2' must be \"all\", \"none\", \"prune:N"):
        parse(EvalOptions, options | {"images": "max:2"}, as_flag)
    with pytest.raises(ViSpecError, match="family llava, the target of qwen2_5_vl"):
        evaluate(EvalOptions(**options | {"head": tiny.sibling("llava")}))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_next"])
def test_without_images_it_reads_the_text_alone(
    tiny: TinyStore, dialogues: Path, kind: str
) -> None:
    target = tiny.target(kind)
    info = find_published(tiny.sibling(kind), str(target))
    assert info is not None
    draft = PublishedModel.load(info, share=read_images("none"))
    encoder = Encoder(load_processor(target), image_root=dialogues.parent)
    samples = [
        one
        for item in list(read_conversations(dialogues))[:3]
        if isinstance(one := encoder(cast(Conversation, item)), Encoded)
    ]
    assert [len(one.runs) for one in samples] == [0, 1, 2]
    batch = pad_batch(TrainingTarget.load(target, torch.float32, "cpu").observe(samples), 16)
    with torch.inference_mode():
        state_BLD = draft(batch)
        for sample, state_LD in zip(samples, state_BLD, strict=True):
            is_text_L = ~image_mask([sample.runs], len(sample.token_ids))[0]
            ids_1N = sample.token_ids[is_text_L][None]
            alone_ND = draft.model.model(input_ids=ids_1N, use_cache=False).last_hidden_state[0]
            # Row p is token p + 1's.
            rows_N = is_text_L.nonzero()[:, 0] - 1
            torch.testing.assert_close(state_LD[rows_N[1:]], alone_ND[1:], atol=1e-4, rtol=1e-4)


def distil(tiny: TinyStore, dialogues: Path, output: Path, kind: str, **changes: Any) -> Any:
    """A recipe that trains the sibling on the target's answers."""
    target = tiny.target(kind)
    return recipe(
        target,
        greedy_answers(target, dialogues),
        output,
        **{
            "head__kind": "draft_vlm",
            "head__init_from": tiny.sibling(kind),
            "head__trained": "language_model",
            "schedule__max_steps": 12,
            "data__validation_share": 0,
            **changes,
        },
    )


def accepted(tiny: TinyStore, dialogues: Path, kind: str, draft: str) -> float:
    """Mean accepted tokens of a draft on the answers that `distil` trains on."""
    target = tiny.target(kind)
    options = EvalOptions(
        target=str(target),
        head=draft,
        data=greedy_answers(target, dialogues),
        num_speculative_tokens=3,
        device="cpu",
    )
    return evaluate(options).simulated["overall"].mean_accepted_tokens


@pytest.mark.parametrize(
    ("kind", "part"), [("qwen2_5_vl", "language_model"), ("llava_next", "all")]
)
def test_trained_on_the_targets_answers_it_is_an_ordinary_model_again(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, kind: str, part: str
) -> None:
    sibling = Path(tiny.sibling(kind))
    outcome = run(distil(tiny, dialogues, tmp_path, kind, head__trained=part))
    assert outcome.head is not None
    before = accepted(tiny, dialogues, kind, str(sibling))
    after = accepted(tiny, dialogues, kind, str(outcome.head))
    assert after > 1.2 * before > 0
    published, trained = (load_file(one / "model.safetensors") for one in (sibling, outcome.head))
    assert trained.keys() == published.keys()
    same = {name for name in trained if torch.equal(trained[name], published[name])}
    reads_images = {name for name in trained if re.search("vis|projector|image", name)}
    assert same == reads_images if part == "language_model" else same < reads_images
    copied = {file.name for file in sibling.iterdir()} - {"model.safetensors"}
    for name in copied:
        assert (outcome.head / name).read_bytes() == (sibling / name).read_bytes(), name
    assert {file.name for file in outcome.head.iterdir()} - copied == {
        "model.safetensors",
        "provenance.json",
        "README.md",
    }
    card = (outcome.head / "README.md").read_text()
    assert f"vllm serve {tiny.target(kind)} --speculative-config" in card
    # Exported again over itself.
    assert run(distil(tiny, dialogues, tmp_path, kind, head__trained=part)).head == outcome.head


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_is_saved_under_its_published_names(
    tiny: TinyStore, tmp_path: Path, kind: str
) -> None:
    sibling = Path(tiny.sibling(kind))
    model = load_model(sibling, torch.float32)
    export_model(model, sibling, Export(tmp_path / "new", "org/target", "bfloat16", 3, {}))
    published, saved = (load_file(one / "model.safetensors") for one in (sibling, tmp_path / "new"))
    assert saved.keys() == published.keys()
    assert all(saved[name].equal(published[name].bfloat16()) for name in saved)
    again = load_model(tmp_path / "new", torch.float32)
    assert str(again.config.dtype) == "torch.float32"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__name": "specvlm"}, "compares hidden states"),
        ({"head__trained": "projector"}, "set head.trained language_model"),
        ({"teacher__mode": "offline"}, "set teacher.mode online"),
        ({"head__num_layers": 3}, "head.num_layers is 3"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ViSpecError, match=message):
        run(distil(tiny, dialogues, tmp_path, "qwen2_5_vl", **changes))
