"""Options that come from settings classes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.profile import ProfileSettings
from vllm_vispec.cli.options import attribute_docs, options_of
from vllm_vispec.utils.errors import ViSpecError

CLI = CliRunner()
SETTINGS = (MatrixSettings, ProfileSettings)


@dataclass(frozen=True)
class Shape:
    """A made-up settings class.

    Attributes:
        name: What it is called, e.g. a.b. Later sentences are no help.
        sizes: Numbers,
            separated by commas.
        angles: Some angles.
        serve_args: Words of a command line.
        folded: Whether it is folded.
        machine: Found out, if it is not given.

    Raises:
        ViSpecError: a size is negative.
    """

    name: str
    sizes: tuple[int, ...] = (1, 2)
    angles: tuple[float, ...] = (0.0, 0.5)
    serve_args: tuple[str, ...] = ()
    folded: bool = True
    machine: str = field(default_factory=lambda: "here")

    def __post_init__(self) -> None:
        if min(self.sizes, default=0) < 0:
            raise ViSpecError("--sizes has a negative one")


@dataclass(frozen=True)
class Colour:
    """Another one.

    Attributes:
        hue: Any number.
    """

    hue: float | None = None


def invoke(*words: str, **options: Any) -> tuple[Any, list[Any]]:
    seen: list[Any] = []
    app = typer.Typer()

    @app.command()
    @options_of(Shape, Colour, **options)
    def draw(shape: Shape, colour: Colour, times: int = 1) -> int:
        """Draw a shape."""
        seen.extend((shape, colour, times))
        return times - 1

    return CLI.invoke(app, list(words), env={"COLUMNS": "120", "TERM": "dumb"}), seen


def test_fields_are_options() -> None:
    words = "--name a --sizes 3,4 --angles 1.5 --no-folded --hue 2 --times 4 --machine there"
    result, seen = invoke(*words.split(), "--serve", "--dtype 'float 32'")
    assert seen == [
        Shape("a", (3, 4), (1.5,), ("--dtype", "float 32"), False, "there"),
        Colour(2.0),
        4,
    ]
    assert result.exit_code == 3  # what the command returned


def test_defaults_are_those_of_the_class() -> None:
    result, seen = invoke("--name", "a")
    assert result.exit_code == 0, result.output
    assert seen == [Shape("a"), Colour(), 1]
    assert invoke("--name", "a", "--sizes", "")[1][0] == Shape("a", ())


def test_a_command_may_show_some_fields_with_other_defaults() -> None:
    options = {"shown": ["sizes", "hue"], "defaults": {"name": "b", "sizes": (5,), "hue": 1.0}}
    assert invoke(**options)[1][:2] == [Shape("b", (5,)), Colour(1.0)]
    assert invoke("--sizes", "6", "--hue", "2", **options)[1][:2] == [Shape("b", (6,)), Colour(2.0)]
    assert invoke("--folded", **options)[0].exit_code == 2


def test_help_is_the_first_sentence_about_a_field() -> None:
    assert attribute_docs(Shape)["name"] == "What it is called, e.g. a.b."
    assert attribute_docs(Shape)["sizes"] == "Numbers, separated by commas."
    text = invoke("--help")[0].output
    for said in ("Draw a shape.", "Numbers, separated by commas. [default: 1,2]", "0,0.5", "--hue"):
        assert said in text
    assert "Later sentences" not in text


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_option_of_a_bench_command_has_a_help(settings: type) -> None:
    assert {field.name for field in fields(settings)} == attribute_docs(settings).keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "1,x"], "--sizes 1,x: give values separated by commas"),
        (["--sizes", "-1"], "--sizes has a negative one"),
        (["--serve", "'"], "--serve ': No closing quotation"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    result, seen = invoke("--name", "a", *words)
    assert (result.exit_code, seen) == (1, [])
    assert result.stderr.startswith(f"vispec: {said}")
    assert result.stderr.count("\n") == 1
