"""The real pair: its folder from a stub of SmolLM2, its questions, a run that goes on."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from typer.testing import CliRunner

from benchmarks import real_replay
from benchmarks.real import RealStudy
from benchmarks.real_replay import CLASSES, REPLAYED, Replay, content, count, replay_heads
from benchmarks.study import HELD_OUT, Variant
from examples.real_vlm import build, canvas, questions, train, vision
from examples.real_vlm.samples import KINDS, Own, make_sample, stated
from examples.real_vlm.state import Run
from tests.support.heads import write_tensors
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.init import new_draft, new_head_config
from vllm_vispec.utils.files import read_json

CHAT = ("Who are you?", "I am a model. Ask me.", True)
OWN = Own(
    {"cat": ["A cat sleeps a lot."]},
    [
        {
            "names": ["cat", "boat"],
            "question": "Tell.",
            "answer": "A cat took a boat",
            "whole": False,
        }
    ],
    [CHAT],
)


@pytest.fixture(autouse=True)
def _pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares for the pictures of a package that tests do not need."""
    monkeypatch.setattr(canvas, "picture", lambda name, side: Image.new("RGBA", (side, side)))


def _read(gguf: Path) -> tuple[Any, Any]:
    """A Llama and a tokenizer of SmolLM2's kind, small."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *build.IMAGE_TOKENS]
    vocab = {name: i for i, name in enumerate([*specials, *pre_tokenizers.ByteLevel.alphabet()])}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(specials)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stands for the package's, read by `_read`."""
    monkeypatch.setattr(build, "read_llama", _read)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"stub")
    return file


def _build(*arguments: object) -> Any:
    import typer

    app = typer.Typer()
    app.command()(build.main)
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_text_logits_are_those_of_the_language_model(stub: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path / "target"
    assert _build("--gguf", stub, "--output", folder, "--adapter", "none").exit_code == 0
    built = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    llama, ids = _read(stub)[0], torch.arange(20, 60)[None]
    for weight in llama.parameters():
        weight.data = weight.data.bfloat16().float()
    with torch.no_grad():
        assert torch.equal(built(input_ids=ids).logits, llama(ids).logits)
    assert "already built" in _build("--gguf", stub, "--output", folder, "--adapter", "none").output
    # What training encodes is what the template and the processor of the folder make.
    processor = AutoProcessor.from_pretrained(folder)
    for kind in KINDS:
        sample = make_sample(3, OWN, kind)
        encoded = train.encode(sample, processor.tokenizer)
        prompt = processor.apply_chat_template(
            sample.messages(len(sample.turns) - 1), add_generation_prompt=True
        )
        drawn = [one.image for one in sample.images] or None
        ids = processor(text=prompt, images=drawn)["input_ids"][0]
        end = "<|im_end|>" if kind != "story" else ""  # the story was cut
        answer = f"{sample.turns[-1].answer}{end}"
        assert encoded.ids[: len(ids)] == list(ids)
        assert processor.decode(encoded.ids[len(ids) : -1]) == answer
        assert encoded.answer[len(ids) : -1] == [True] * (len(encoded.ids) - len(ids) - 1)


def test_a_build_is_whole_or_not_there(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "target"

    def killed(model: Any, tokenizer: Any, aside: Path) -> None:
        (aside / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_target", killed)
        _build("--gguf", stub, "--output", folder, "--adapter", "none")
    assert not folder.exists()
    assert _build("--gguf", stub, "--output", folder, "--adapter", "none").exit_code == 0
    stub.write_bytes(b"another")
    found = _build("--gguf", stub, "--output", folder, "--adapter", "none")
    assert found.exit_code == 2
    assert "was built from other files: remove it or give --output" in found.output


def test_without_the_package_one_line_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    failed = SimpleNamespace(returncode=1, stderr="ERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    found = _build("--output", tmp_path / "target")
    assert found.exit_code == 2
    assert "ERROR: no matching distribution" in found.output
    assert "give --gguf FILE" in found.output


def test_the_adapter_adds_lora_to_the_weights(stub: Path, tmp_path: Path) -> None:
    model = build.make_model(_read(stub)[0])
    tower = {n: v + 1 for n, v in model.state_dict().items() if ".visual." in n}
    layer = "model.language_model.layers.1.mlp.up_proj"
    down, up = torch.randn(32, 64), torch.randn(96, 32)
    lora = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_file(tower | lora, tmp_path / "adapter.safetensors")
    before = model.get_parameter(f"{layer}.weight").detach().clone()
    build.merge_adapter(model, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(model.get_parameter(f"{layer}.weight"), before + 2 * up @ down)
    name = next(iter(tower))
    assert torch.equal(model.get_parameter(name), tower[name])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chat"])
def test_an_answer_states_its_facts_and_an_image_has_its_tokens(kind: str) -> None:
    for seed in range(40):
        sample = make_sample(seed, OWN, kind)
        for turn in sample.turns:
            assert stated(turn.facts, turn.answer) == len(turn.facts)
            assert stated(turn.facts, "I cannot see any image.") == 0
        for image in sample.images:
            assert 64 <= image.tokens <= 1024
            assert image.image.size == (28 * image.cols, 28 * image.rows)


def test_questions_are_what_regenerate_reads(tmp_path: Path) -> None:
    from vllm_vispec.data.read import read_conversations
    from vllm_vispec.data.types import Conversation

    (tmp_path / "own").mkdir()
    part = {"about": OWN.about, "stories": OWN.stories, "chats": [CHAT, CHAT]}
    (tmp_path / "own" / "part-0.json").write_text(json.dumps(part))
    questions.main(tmp_path, count=len(KINDS), own=tmp_path / "own")
    found = list(read_conversations(tmp_path / "questions.jsonl"))
    assert all(isinstance(one, Conversation) for one in found)
    assert {getattr(one, "family", "") for one in found} == set(questions.PROMPTS.values())


def test_a_perfect_tower_has_no_loss_but_the_names() -> None:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return [words.setdefault(text, len(words))]

    words: dict[str, int] = {}
    table = torch.eye(600)
    loss = vision.CellLoss.make(SimpleNamespace(encode=encode), table, images=20)
    cells = vision.cell_tokens(vision.draw(-3), SimpleNamespace(encode=encode))
    known = {int(word) for word in loss.words_W}
    assert all(set(cell) <= known for cell in cells)
    blank = [words["\n"]]
    perfect = torch.stack([table[cell or blank].sum(0) for cell in cells])
    best, right = loss(perfect, cells)
    worse, wrong = loss(perfect.roll(1, 1), cells)
    assert right == 1.0
    assert wrong < 0.2
    assert best < worse


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def start() -> Run:
        torch.manual_seed(0)
        weights = {"w": nn.Parameter(torch.ones(3)), "unused": nn.Parameter(torch.ones(2))}
        optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
        return Run(tmp_path / "run.safetensors", weights, optimizer, budget=60.0)

    run = start()
    for _ in range(3):
        run.trained["w"].square().sum().backward()
        run.update(warmup=1)
    run.log.append({"step": 3})
    run.save()
    again = start()
    assert (again.step, again.log) == (3, [{"step": 3}])
    assert again.seconds >= run.seconds > 0
    for name, value in run.trained.items():
        assert torch.equal(again.trained[name], value)
    for key, state in run.optimizer.state[run.trained["w"]].items():
        assert torch.equal(again.optimizer.state[again.trained["w"]][key], state)
    assert json.loads((tmp_path / "run.jsonl").read_text()) == {"step": 3}


def test_the_study_shows_heads_other_images(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From questions to counts, on the stub: only a head that sees images drafts other tokens."""
    drafted: list[list[torch.Tensor]] = []

    def noting(family: str, ids: torch.Tensor, tokens: list[torch.Tensor], *more: Any) -> Any:
        drafted.append(tokens)
        return count(family, ids, tokens, *more)

    monkeypatch.setattr(real_replay, "count", noting)
    target, kinds = tmp_path / "target", {"blind": "specvlm", "sees": "eagle_vlm"}
    assert _build("--gguf", stub, "--output", target, "--adapter", "none").exit_code == 0
    arms = tuple(Variant(name, name, kind, epochs=(1,)) for name, kind in kinds.items())
    study = RealStudy(tmp_path, str(target), arms, (0,), 0, 6, 2, own=tmp_path / "none")
    folder = study.questions(HELD_OUT)
    study.write_questions(folder, "heldout", 10**9, 6, ("table", "chat"))
    shutil.copy(folder / "questions.jsonl", folder / "answers.jsonl")
    text = load_target_config(target).get_text_config()
    for trained in study.heads():
        made = "text_only" if trained.variant.name == "blind" else ""
        config = new_head_config(trained.variant.kind, text, compressor=made)
        weights = new_draft(config, torch.empty(0), 0).state_dict()
        write_tensors(study.head(trained), "canonical", config, weights)
    replay_heads(study, study.heads())
    for trained in study.heads():
        found = read_json(study.result(REPLAYED, trained))
        replays = [Replay.from_json(one) for one in found]
        assert {one.family for one in replays} == {"charts_tables", "text"}
        worth = content([replays])
        assert all(worth[name]["tokens"] > 100 for name in CLASSES)
        mine, drafted = drafted[: len(replays)], drafted[len(replays) :]
        other = [any(not torch.equal(tokens[0], x) for x in tokens[1:]) for tokens in mine]
        of_images = [one.family != "text" for one in replays]
        assert other == (of_images if trained.variant.name == "sees" else [False] * 6)
