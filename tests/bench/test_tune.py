"""`vispec bench tune`: the choice from measured speeds, the setting, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.fakes import HEAD, TARGET, World
from tests.bench.made_up_speeds import run_with
from vllm_vispec.bench.load import LoadJob
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.schedules import SETTING
from vllm_vispec.bench.schema import BenchRun, CellResult
from vllm_vispec.bench.tune import Gain, Tuning, choose_k, gains_of
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError

CLI = CliRunner()
SPEEDS = {
    1: {0: 0.97, 1: 1.4, 3: 2.0, 5: 2.2},
    4: {0: 0.97, 1: 1.3, 3: 1.6, 5: 1.5},
    16: {0: 0.97, 1: 1.1, 3: 1.0, 5: 0.8},
    64: {0: 0.99, 1: 0.9, 3: 0.7, 5: 0.5},
}
RANGES = ((1, 1, 5), (2, 7, 3), (8, 31, 1), (32, 64, 0))


def gains(**values: float) -> dict[int, Gain]:
    return {int(name[1:]): Gain(value, 0.02) for name, value in values.items()}


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (gains(k0=0.97, k1=1.4, k3=2.0, k5=1.9), 3),
        # 5 is not measurably faster than 3.
        (gains(k0=0.97, k1=1.4, k3=2.0, k5=2.03), 3),
        (gains(k0=0.97, k1=0.9), 0),
        # Nothing reaches plain: the one that loses least, if that is certain.
        (gains(k0=0.90, k1=0.97), 1),
        # 0 and 1 cannot be told apart, but 0 itself loses.
        (gains(k0=0.97, k1=0.985), 1),
        (gains(k0=0.985, k1=0.99), 0),
        # 0 was not measured: plain vLLM's speed stands for it.
        (gains(k1=1.01, k3=0.9), 0),
        (gains(k1=1.05, k3=0.9), 1),
        (gains(k2=0.7), 0),
    ],
)
def test_choice(given: dict[int, Gain], chosen: int) -> None:
    assert choose_k(given) == chosen


def test_tuning_of_a_run() -> None:
    tuning = Tuning.from_run(run_with(SPEEDS))
    assert dict(tuning.chosen) == {1: 5, 4: 3, 16: 1, 64: 0}
    # Midway: 2 is between 1 and 4, so it goes with 4; 8 between 4 and 16, 32 between 16 and 64.
    assert tuning.ranges == RANGES
    assert tuning.config == {
        "method": "vispec",
        "model": "some/head",
        "num_speculative_tokens": 5,
        SETTING: [list(entry) for entry in RANGES],
    }
    for load, by_k in SPEEDS.items():
        for k, speed in by_k.items():
            gain = tuning.gains[load][k]
            assert gain.value == pytest.approx(speed, rel=1e-3)
            assert gain.low <= gain.value <= gain.high
    # Of one K at every load, which is what was measured.
    fixed = {"method": "vispec", "model": "some/head", "num_speculative_tokens": 3}
    assert Tuning.from_run(run_with({1: {3: 2.0}})).config == fixed | {"adaptive": False}
    more = {"images": "prune:4"}
    asked = replace(tuning.run, settings={**tuning.run.settings, "speculative_config": more})
    assert Tuning.from_run(asked).config == {**(tuning.config or {}), **more}


PATH = "spec_llava:0.3"
CHAINS = {1: {0: 0.97, 2: 1.6, 8: 1.8}, 16: {0: 0.97, 2: 1.2, 8: 0.8}}


@pytest.mark.parametrize(
    ("paths", "variant", "chosen"),
    [
        ({1: {2: 1.5, 8: 2.4}, 16: {2: 1.3, 8: 1.5}}, PATH, {1: 8, 16: 8}),
        # Better than the chain at one load, measurably worse on average.
        ({1: {2: 1.5, 8: 1.9}, 16: {2: 0.9, 8: 0.7}}, "vispec", {1: 8, 16: 2}),
        # Not measurably better: chains need nothing special.
        ({1: {8: 1.8001}, 16: {2: 1.2001}}, "vispec", {1: 8, 16: 2}),
        # The server failed at a load.
        ({1: {8: 9.0}}, "vispec", {1: 8, 16: 2}),
        # No path pays at 16, where the draft is kept up.
        ({1: {8: 9.0}, 16: {2: 0.5}}, PATH, {1: 8, 16: 0}),
    ],
)
def test_thresholds_are_chosen_beside_k(
    paths: dict[int, dict[int, float]], variant: str, chosen: dict[int, int]
) -> None:
    run, more = run_with(CHAINS), run_with(paths, PATH)
    both = replace(run, cells=(*run.cells, *(c for c in more.cells if c.key.variant == PATH)))
    tuning = Tuning.from_run(both)
    assert (tuning.variant, dict(tuning.chosen)) == (variant, chosen)
    k = max(chosen.values())
    tree = {"policy": "spec_llava", "depth": k - 1, "top_k": 1, "threshold": 0.3}
    config = tuning.config or {}
    assert config.get("tree") == (tree if variant == PATH else None)
    settings = MatrixSettings(target="t", head="h", speculative_config={"images": "none"})
    tried = tuning.verify_settings(settings).speculative_config
    assert tried == {"images": "none", **({"tree": tree} if variant == PATH else {})}
    rows = {(row["variant"], row["concurrency"]) for row in tuning.to_json()["rows"]}
    assert rows == {("vispec", 1), ("vispec", 16)} | (
        {(PATH, load) for load in paths} if len(paths) == 2 else set()
    )
    text = tuning.to_markdown()
    assert text.count("| concurrency |") == len(paths)
    assert text.count(": taken") == (len(paths) == 2)


def test_several_conditions_are_averaged() -> None:
    run = run_with({1: {1: 1.5, 3: 2.0}}, conditions=((0.0, -1), (1.0, -1)))

    def slower(one: CellResult) -> bool:
        return one.key.temperature == 0.0 or one.key.num_speculative_tokens == 1

    assert gains_of(run, "vispec")[1][3].value == pytest.approx(2.0, rel=1e-3)
    # What was not measured at every K is left out.
    cells = tuple(one for one in run.cells if slower(one))
    found = gains_of(BenchRun(1, {}, {}, cells), "vispec")
    assert found[1][1].value == pytest.approx(1.5, rel=1e-3)
    assert found[1][1].spread > 0


def test_a_faster_k_that_is_not_chosen_is_explained() -> None:
    tuning = Tuning.from_run(run_with({1: {6: 2.0, 8: 2.04}, 8: {6: 2.0, 8: 2.5}}, noise=0.1))
    assert tuning.chosen == {1: 6, 8: 8}
    (reason,) = (line for line in tuning.to_markdown().splitlines() if "not K" in line)
    assert reason.startswith("concurrency 1: K = 6 (1.98x) is chosen, not K = 8 (2.02x)")
    assert "within the 95 % interval" in reason
    assert "--repetitions" in reason


def test_a_run_without_vispec() -> None:
    with pytest.raises(ViSpecError, match="no decode_speedup of the variant vispec"):
        Tuning.from_run(run_with(SPEEDS, variant="ngram"))
    with pytest.raises(ViSpecError, match="--by ttft"):
        Tuning.from_run(run_with(SPEEDS), by="ttft")


def test_verdicts_say_where_it_loses() -> None:
    tuning = Tuning.from_run(run_with(SPEEDS))
    tried = run_with({1: {5: 2.1}, 4: {5: 1.6}, 64: {5: 0.95}}, variant="vispec_tuned")
    told = tuning.with_verification(tried)
    lines = told.to_markdown().splitlines()
    assert "concurrency 16: the setting was not measured" in lines
    assert any(line.startswith("concurrency 64: 0.95x") and "first pass" in line for line in lines)
    assert lines[2].endswith("| chosen | tuned |")
    assert [one["ok"] for one in told.to_json()["verified"]] == [True, True, False, False]


def test_the_trial_keeps_all_other_settings() -> None:
    tuning = Tuning.from_run(run_with(SPEEDS))
    settings = MatrixSettings(
        target="t",
        dataset="tiny",
        head="h",
        concurrency=(1, 4),
        num_speculative_tokens=(0, 1),
        repetitions=2,
    )
    tried = tuning.verify_settings(settings)
    assert tried.variants == ("plain", "vispec_tuned")
    assert tried.num_speculative_tokens == (5,)
    assert tried.schedule == RANGES
    # Those that were chosen for, also from an earlier call.
    assert tried.concurrency == (1, 4, 16, 64)
    assert tried.repetitions == 2


def speeding(world: World, monkeypatch: pytest.MonkeyPatch, tuned: float = 1.0) -> None:
    """Let servers answer as fast as their K says: 3 is best at 1, 0 at 8."""
    plain = {"1": 1.0, "8": 1.0}
    by_k = {0: plain, 1: {"1": 1.5, "8": 0.9}, 3: {"1": 2.0, "8": 0.8}}

    def load(job: LoadJob) -> Any:
        server = world.servers[job.url]
        arguments = server.arguments
        speed = plain
        if "--speculative-config" in arguments:
            config = json.loads(arguments[arguments.index("--speculative-config") + 1])
            entries = config.get(SETTING, [])
            k = 0 if entries == [[1, 1, 0]] else config["num_speculative_tokens"]
            speed = {"1": 2.0, "8": tuned} if len(entries) > 1 else by_k[k]
        result = make(job)
        faster = speed[str(job.concurrency)]
        requests = tuple(
            replace(request, e2e_s=request.ttft_s + 0.3 / faster * (1 + 0.001 * number))
            for number, request in enumerate(result.requests)
        )
        return replace(result, requests=requests)

    make = world.make_load
    monkeypatch.setattr(world, "make_load", load)


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    given = ["--target", str(TARGET), "--head", str(HEAD), "--data", str(data)]
    matrix = ["--concurrency", "8,1", "-k", "0,1,3", "--repetitions", "2"]
    return ["bench", "tune", *given, "--output", str(output), *matrix, *more]


def test_command(world: World, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeding(world, monkeypatch, tuned=0.9)
    output = tmp_path / "out"
    result = CLI.invoke(app, arguments(data, output))
    # It loses at 8, which is said and fails nothing.
    assert result.exit_code == 0, result.output
    config = {
        "method": "vispec",
        "model": str(HEAD),
        "num_speculative_tokens": 3,
        SETTING: [[1, 2, 3], [3, 8, 0]],
    }
    assert f"--speculative-config '{json.dumps(config)}'" in result.output.splitlines()
    assert "concurrency 8: 0.90x with this setting, below 0.98x" in result.output
    written = json.loads((output / "tune.json").read_text())
    assert written["speculative_config"] == config
    assert [one["ok"] for one in written["verified"]] == [True, False]
    loads = len(world.loads())
    again = CLI.invoke(app, arguments(data, output))
    assert again.exit_code == 0, again.output
    assert len(world.loads()) == loads


def test_thresholds_are_measured_beside_k(world: World, data: Path, tmp_path: Path) -> None:
    given = arguments(data, tmp_path, "--thresholds", f"{PATH}, entropy:0.1", "--no-verify")
    result = CLI.invoke(app, given)
    assert result.exit_code == 0, result.output
    run = BenchRun.load(tmp_path / "measured")
    by_k: dict[int, set[str]] = {}
    for one in run.cells:
        by_k.setdefault(one.key.num_speculative_tokens, set()).add(one.key.variant)
    chains = {"plain", "vispec"}
    # A path of one token cannot end early.
    assert by_k == {0: chains, 1: chains, 3: {*chains, PATH, "entropy:0.1"}}
    (command,) = {one.command.splitlines()[0] for one in run.cells if one.key.variant == PATH}
    assert '"tree": {"policy": "spec_llava", "depth": 2, "top_k": 1, "threshold": 0.3}' in command
    refused = CLI.invoke(app, arguments(data, tmp_path, "--thresholds", "0.3"))
    assert refused.stderr.startswith("vispec: --thresholds 0.3: write a policy and a threshold")


def test_from_a_run(tmp_path: Path) -> None:
    run = run_with(SPEEDS)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run.to_json()))
    result = CLI.invoke(app, ["bench", "tune", "--from", str(file)])
    assert result.exit_code == 0, result.output
    ranges = [list(entry) for entry in RANGES]
    assert json.dumps(ranges) in result.output
    assert json.loads((tmp_path / "tune.json").read_text())["schedule"] == ranges
    elsewhere = tmp_path / "elsewhere"
    CLI.invoke(app, ["bench", "tune", "--from", str(file), "--output", str(elsewhere)])
    assert (elsewhere / "tune.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--target is missing"),
        (["--from", "nowhere"], "nowhere cannot be read"),
        (["--from", "nowhere", "--by", "speed"], "nowhere"),
    ],
)
def test_users_errors(given: list[str], message: str) -> None:
    result = CLI.invoke(app, ["bench", "tune", *given])
    assert result.exit_code != 0
    assert message in result.output
