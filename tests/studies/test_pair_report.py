"""The command behind the committed report, with stand-ins for servers and load."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pair_report import pair_settings, reproduce
from examples.tiny_vlm.questions import IMAGE_FAMILIES
from tests.bench.fakes import World, lines
from vllm_vispec.bench.schema import CELLS_FILE, BenchRun

SAMPLES = 12


def test_the_report_is_made_from_nothing(tmp_path: Path) -> None:
    settings = pair_settings().replace(
        concurrency=(1, 4),
        num_speculative_tokens=(5, 3),
        image_tokens=(-1, 0, 64),
        repetitions=2,
        warm_up=0,
    )
    work, pages, results = [tmp_path / name for name in ("work", "pages", "results")]
    world = World(broken={"ngram"})
    assert not reproduce(settings, work, pages, results, world.tools(), SAMPLES)
    families = {record["family"] for record in lines(work / "data" / "questions.jsonl")}
    assert families == set(IMAGE_FAMILIES)

    (results / CELLS_FILE).write_text("an earlier version's\n")
    world = World()
    assert reproduce(settings, work, pages, results, world.tools(), SAMPLES)
    # Only what had failed is measured again: 6 points around K = 5, one at 3.
    assert {load.split()[1] for load in world.loads()} == {"ngram"}
    run = BenchRun.load(results)
    assert len(run.cells) == (5 + 1) * 6 * 2
    assert not any(cell.error for cell in run.cells)
    text = (pages / "report.md").read_text()
    assert "Failed and missing cells\n\nNone:" in text
    for title in ("concurrency", "image tokens", "K", "temperature"):
        assert f"## Speedup against {title}\n\nNot shown" not in text
    assert "Acceptance per position" in text
    assert "multi_turn" in text
    assert (pages / "report.html").is_file()


def test_the_schedule_adds_a_side() -> None:
    assert "vispec_tuned" not in pair_settings().variants
    tuned = pair_settings(((1, 8, 5), (9, 64, 2)))
    assert "vispec_tuned" in tuned.variants
    assert tuned.repetitions == 3
