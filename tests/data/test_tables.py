"""Parquet files and data sets of the hub, as conversation files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from tests.support.tiny_models import random_image
from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe
from tests.train.test_processes import arguments
from vllm_vispec.cli.app import app
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.tables import is_table, write_out
from vllm_vispec.data.types import Conversation
from vllm_vispec.utils.errors import ViSpecError


def rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows as data sets have them: images as bytes, in messages that only mark them."""
    found = []
    for number in range(count):
        file = folder / f"{number}.png"
        random_image(number, (56, 56)).save(file)
        content = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
        answer = [{"type": "text", "text": "a red ball near two blue boxes"}]
        messages = [("user", content), ("assistant", answer)]
        found.append(
            {
                "messages": [{"role": role, "content": parts} for role, parts in messages],
                "images": [{"bytes": file.read_bytes(), "path": file.name}],
            }
        )
    return found


class FakeDatasets:
    """Reads parquet files; the data set of the hub is one of them."""

    def __init__(self, hub: Path) -> None:
        self.hub, self.asked = hub, list[tuple[str, str]]()

    def load_dataset(self, name: str, split: str, data_files: str | None = None) -> Any:
        self.asked.append((name, split))
        table = parquet.read_table(data_files or self.hub)

        def batches(batch_size: int) -> Iterator[Any]:
            return (table.slice(n, batch_size) for n in range(0, len(table), batch_size))

        return SimpleNamespace(with_format=lambda _: SimpleNamespace(iter=batches))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows(tmp_path, 70)), file)
    try:
        import datasets  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(file))
    return file


def test_a_parquet_file(table: Path, tmp_path: Path) -> None:
    file = write_out(table, tmp_path / "out")
    found = list(read_conversations(file))
    assert len(found) == 70
    for number, one in enumerate(found):
        assert isinstance(one, Conversation)
        (image,) = one.images
        original = (tmp_path / f"{number}.png").read_bytes()
        assert (file.parent / image).read_bytes() == original
        assert one.turns[0].text == "What is it?"
    # A second run reads what is there; another table is not mixed in.
    assert write_out(table, tmp_path / "out") == file
    parquet.write_table(pyarrow.Table.from_pylist(rows(tmp_path, 3)), table)
    with pytest.raises(ViSpecError, match="as it was before: delete it"):
        write_out(table, tmp_path / "out")
    table.unlink()
    assert write_out(table, tmp_path / "out") == file
    with pytest.raises(ViSpecError, match="holds another data set"):
        write_out("hf://org/name", tmp_path / "out")


def test_a_data_set_of_the_hub(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeDatasets(table)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for number, (name, split) in enumerate({"": "train", ":test": "test"}.items()):
        # Options of type Path drop a slash.
        source = Path(f"hf://org/name{name}")
        assert is_table(source)
        assert len(write_out(source, tmp_path / f"{number}").read_text().splitlines()) == 70
        assert fake.asked[-1] == ("org/name", split)


def test_tables_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path
) -> None:
    with pytest.raises(ViSpecError, match=r"gone\.parquet cannot be read"):
        write_out(tmp_path / "gone.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ViSpecError, match=r"pip install 'vllm-vispec\[data\]'"):
        write_out(table, tmp_path / "out")


def test_training_reads_a_table(table: Path, tiny: TinyStore, tmp_path: Path) -> None:
    config = recipe(tiny.target("llava"), table, tmp_path / "run", schedule__max_steps=1)
    done = CliRunner().invoke(app, ["train", *arguments(config)])
    assert "finished after 1 step" in done.output, done.output
