"""`vispec verify` on made-up engines: what is noise, what fails, the page and the exit status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from examples.tiny_vlm.shipped import SIBLING
from vllm_vispec.cli.app import app
from vllm_vispec.utils.process import RequestFailed
from vllm_vispec.verify import run as verify_run
from vllm_vispec.verify.prompts import PROMPTS
from vllm_vispec.verify.result import Verification
from vllm_vispec.verify.run import Verifier, VerifyProcess, VerifySettings

SETTINGS = VerifySettings(target="target", head="head")
LAYERS = {"count": 24, "backend": "CPU_ATTN", "head_size": 64, "padded_size": 64}
LAYERS |= {"num_heads": 4, "num_kv_heads": 2, "kv_cache_dtype": "auto (bfloat16)"}
NAMES = {"runner": "V1", "device_type": "cpu", "device": "cpu", "capability": "none"}
STATE: dict[str, Any] = {
    **NAMES,
    "dtype": "bfloat16",
    "target": [LAYERS],
    "draft": [],
    "compilation": {"mode": "NONE", "backend": ""},
    "cudagraph_mode": "NONE",
    "graphs": {},
}
PADDED = STATE | {"draft": [LAYERS | {"count": 1, "padded_size": 80}]}
TOKENS = (5, 6, 7, 2)


@dataclass
class World:
    """What all engines do.

    Attributes:
        change: makes an engine's tokens for a prompt and a number of prompts that are asked.
        gap: plain vLLM's between its two likeliest tokens, 7 and 9 at the third position.
        drift: how much smaller it is when all prompts are asked together.
        broken: engines that do not start, and why; refused ones with "refused" in front.
        mute: prompts that plain vLLM does not answer.
        attention: error of the backend.
    """

    change: Callable[[str, str, int], tuple[int, ...]] = lambda *_: TOKENS
    gap: float = 3.0
    drift: float = 0.1
    broken: dict[str, str] = field(default_factory=dict)
    mute: tuple[str, ...] = ()
    attention: dict[str, Any] = field(default_factory=lambda: {"prompt": 0.01, "decode": 0.001})
    accepted: int = 60
    steps: list[str] = field(default_factory=list)


class FakeProcess:
    """Stands in for the child process of an engine or backend."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.refused = world, name, False

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def request(self, content: dict[str, Any]) -> dict[str, Any]:
        """Answer as the child does."""
        return dict(getattr(self, content["do"])(content))

    def start(self, content: dict[str, Any]) -> dict[str, Any]:
        reason = self.world.broken.get(self.name)
        if reason is not None:
            self.refused = reason.startswith("refused")
            raise RequestFailed(reason)
        assert ("speculative_config" in content["engine"]) == (self.name != "plain")
        return STATE if self.name == "plain" else PADDED

    def ask(self, content: dict[str, Any]) -> dict[str, Any]:
        names = [PROMPTS[place].name for place in content["prompts"]]
        if len(names) == 1 and names[0] in self.world.mute:
            raise RequestFailed("the prompt is too long")
        assert not set(names).intersection(self.world.mute)
        return {"answers": [self._answer(name, len(names)) for name in names]}

    def _answer(self, name: str, count: int) -> dict[str, Any]:
        tokens = self.world.change(self.name, name, count)
        if self.name != "plain":
            return {"token_ids": tokens}
        gap = self.world.gap - (self.world.drift if count > 1 else 0.0)
        top = [{token: -0.1, 30: -5.0} for token in tokens]
        top[2] = {7: -0.1, 9: -0.1 - gap}
        return {"token_ids": tokens, "top": top}

    def acceptance(self, _: dict[str, Any]) -> dict[str, Any]:
        one = self.world.accepted
        counts = {"num_drafts": 80, "num_draft_tokens": 320, "num_accepted_tokens": 2 * one}
        return counts | {"num_accepted_tokens_per_pos": (one, one, 0, 0)}

    def watch(self, _: dict[str, Any]) -> dict[str, Any]:
        return {}

    def timings(self, content: dict[str, Any]) -> dict[str, Any]:
        assert content["num_draft_passes"] == {"plain": 0, "chain": 4, "tree": 4}[self.name]
        return {"target_step": 0.02, "draft_first_pass": 0.001, "steps": 9}

    def configure(self, content: dict[str, Any]) -> dict[str, Any]:
        assert "speculative_config" not in content["engine"]
        return {}

    def attention(self, content: dict[str, Any]) -> dict[str, Any]:
        found = {"case": content["case"], "backend": self.name, "used_size": 80}
        return found | self.world.attention


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"packages": {"vllm": "0.33.0"}, "gpus": ["NVIDIA H100"]}
    monkeypatch.setattr(verify_run, "describe_machine", lambda: machine)


def run(world: World, settings: VerifySettings = SETTINGS) -> Verification:
    output = Path("out/found.json")
    make = lambda name, _: FakeProcess(world, name)  # noqa: E731
    return Verifier(settings, output, world.steps.append, make).verify("vispec verify")


def page_of(found: Verification) -> str:
    return found.to_markdown()


def one_wrong(name: str, prompt: str, count: int) -> tuple[int, ...]:
    """Let the chain say 9 in place of 7 in one answer, when prompts are asked one by one."""
    wrong = name == "chain" and prompt == PROMPTS[3].name and count == 1
    return (5, 6, 9, 2) if wrong else TOKENS


def test_all_is_well() -> None:
    world = World()
    found = run(world)
    assert found.exit_status == 0
    assert [verdict.state for verdict in found.verdicts] == ["passed", "passed"]
    assert Verification.model_validate_json(found.model_dump_json()) == found
    assert len(world.steps) == Verifier(SETTINGS, Path()).num_steps
    page = page_of(found)
    for said in ("NVIDIA H100", "head size 64 padded to 80", "20.00", "node codes", " 0.75 0.75 |"):
        assert said in page
    assert "**chain: passed** (16 of 16 answers equal, 0 differ within noise, 0 wrong)" in page


WRONG = f"wrong token: {PROMPTS[3].name} (alone), position 2: 9 instead of 7, which plain vLLM "


@pytest.mark.parametrize(
    ("changes", "feature", "said"),
    [
        ({"change": one_wrong}, "chain", f"{WRONG}holds likelier by 3"),
        (
            {"change": lambda name, *_: (5, 6, 7, 8) if name == "tree" else TOKENS},
            "tree",
            "8 instead of 2, which plain vLLM holds much likelier",
        ),
        (
            {"change": lambda name, *_: TOKENS[:2] if name == "tree" else TOKENS},
            "tree",
            "position 2: -1 instead of 7",
        ),
        (
            {"attention": {"prompt": 0.01, "decode": 0.04}},
            "both",
            "CPU_ATTN with heads of 80 is off by 0.04, more than",
        ),
        (
            {"attention": {"failure": "RuntimeError: no kernel"}},
            "both",
            "CPU_ATTN, which this engine uses: RuntimeError",
        ),
        ({"accepted": 0}, "both", "acceptance: none of 320 draft tokens was accepted"),
        ({"broken": {"chain": "refused: another vocabulary"}}, "chain", "refused: another vocab"),
    ],
)
def test_failures(changes: dict[str, Any], feature: str, said: str) -> None:
    found = run(World(**changes))
    assert found.exit_status == 1
    for verdict in found.verdicts:
        assert verdict.state == ("failed" if feature in (verdict.feature, "both") else "passed")
        assert verdict.state == "passed" or said in verdict.reasons[0]
    assert ("WRONG" in page_of(found)) == ("change" in changes)


@pytest.mark.parametrize(
    ("gap", "drift", "state"), [(0.2, 0.1, "passed"), (0.4, 0.5, "passed"), (0.4, 0.3, "failed")]
)
def test_noise(gap: float, drift: float, state: str) -> None:
    """A gap of 0.25 is rounding of bfloat16; a larger one is noise if plain vLLM's own is."""
    found = run(World(change=one_wrong, gap=gap, drift=drift))
    assert found.verdicts[0].state == state
    assert len(found.differences["chain"]) == 1
    assert found.noise is not None
    assert found.noise.limit == pytest.approx(max(drift, 0.25))


def test_plain_vllms_own_difference_is_counted() -> None:
    def change(name: str, prompt: str, count: int) -> tuple[int, ...]:
        return (5, 6, 9, 2) if count > 1 and prompt == PROMPTS[3].name else TOKENS

    found = run(World(change=change, gap=0.2, drift=0.3))
    assert found.noise is not None
    assert found.noise.differing == 1
    assert found.exit_status == 0, "each batch is compared with plain vLLM's own answer to it"


def test_the_shipped_pair_has_a_least_acceptance() -> None:
    shipped = VerifySettings()
    assert run(World(accepted=30), shipped).exit_status == 1
    assert run(World(accepted=70), shipped).exit_status == 0
    assert run(World(accepted=30)).exit_status == 0


def test_what_is_not_there_does_not_fail() -> None:
    """A backend that is not available, a refused tree, a prompt that plain vLLM does not answer."""
    found = run(World(attention={"reason": "head_size not supported"}))
    assert found.exit_status == 0
    assert "not available: head_size not supported" in page_of(found)
    found = run(World(broken={"tree": "refused: no backend serves heads of 92"}))
    assert found.exit_status == 0
    assert "**tree: refused**\n  - refused: no backend serves heads of 92" in page_of(found)
    assert {one.case.padded_size for one in found.attention} == {80, 88}
    found = run(World(mute=(PROMPTS[7].name,)))
    assert found.exit_status == 0
    assert f"does not answer it: {PROMPTS[7].name}: the prompt is too long" in page_of(found)
    assert run(World(mute=tuple(one.name for one in PROMPTS))).exit_status == 1


@pytest.mark.parametrize("name", ["plain", "chain", "tree"])
def test_an_engine_that_does_not_start_gives_one_line(name: str) -> None:
    found = run(World(broken={name: "ValueError: too little free memory"}))
    assert found.exit_status == 1
    page = page_of(found)
    assert "too little free memory" in page
    assert f"Log of {name}: out/found-{name}.log" in page
    assert len(found.engines) == (1 if name == "plain" else 3)


def test_pictures_are_the_same_every_time() -> None:
    for prompt in PROMPTS:
        for (draw, size), part in zip(
            prompt.pictures, prompt.messages()[0]["content"], strict=False
        ):
            assert part["image_pil"].size == size
            assert part["image_pil"].tobytes() == draw(size).tobytes()
            assert len(part["image_pil"].getcolors(1 << 20)) > 1


OURS = "vllm_vispec.utils.errors.ViSpecError: tree: leave it out\n"
CORE = "(EngineCore pid=7) ERROR 11-30 06:00:00 [core.py:1] "
LAST = "RuntimeError: Engine core initialization failed. See root cause above.\n"


@pytest.mark.parametrize(
    ("log", "cause", "refused"),
    [
        (OURS, "tree: leave it out", True),
        (f"{CORE}ValueError: no such kernel\n{LAST}", "no such kernel", False),
        (f"{CORE}{OURS}{LAST}", "tree: leave it out", True),
    ],
)
def test_the_cause_of_a_failed_request(log: str, cause: str, refused: bool, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text(log)
    process = VerifyProcess("tree", file)
    assert str(process.failed({"error": "see above", "is_refusal": False})) == cause
    assert process.refused == refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "a"], "--target and --head belong together"),
        (["--engine-args", "{"], "--engine-args is not JSON"),
        (["--engine-args", "[]"], "--engine-args is not a JSON object"),
        (["--engine-args", '{"model": "a"}'], "--engine-args: model is set by vispec verify"),
        (["--speculative-config", '{"tree": {}}'], "--speculative-config: tree has an option"),
        (["-k", "0"], "--num-speculative-tokens is 0: give at least 1"),
        (["--tree", '{"dept": 3}'], '--tree.dept is unknown; did you mean "tree.depth"'),
        (["--tree-nodes", "3"], "num_speculative_tokens=3 must be an integer between 4 and 127"),
        (["--target", "a", "--head", "/nowhere"], "draft folder '/nowhere' does not exist"),
        (["--target", "/nowhere", "--head", SIBLING], "target /nowhere cannot be used"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_the_examples_the_pair_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_run, "SHIPPED_PAIR", ("/nowhere/target", "/nowhere/head"))
    with pytest.raises(ValueError, match="give --target and --head"):
        VerifySettings()
    assert VerifySettings(target="a", head="b").target == "a"
