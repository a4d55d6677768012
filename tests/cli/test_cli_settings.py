"""Options that come from settings classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pytest
import typer
from pydantic import Field, model_validator
from typer.testing import CliRunner

from vllm_vispec.bench.matrix import ServeArgs
from vllm_vispec.cli.options import options_of
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import CommandSettings, CommaSeparated

CLI = CliRunner()


class Shape(CommandSettings):
    """A made-up settings class."""

    name: str = Field(description="What it is called.")
    sizes: Annotated[tuple[int, ...], CommaSeparated] = Field(
        default=(1, 2), description="Numbers, separated by commas."
    )
    angles: Annotated[tuple[float, ...], CommaSeparated] = (0.0, 0.5)
    words: ServeArgs = Field(default=(), json_schema_extra={"flags": ["--serve"]})
    folded: bool = True
    machine: str = Field(default_factory=lambda: "here")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.sizes, default=0) < 0:
            raise ViSpecError("--sizes has a negative one")
        return self


class Colour(CommandSettings):
    """Another one."""

    hue: float | None = None
    kind: Literal["oil", "chalk"] | None = None


def shape(**values: Any) -> Shape:
    return Shape(**{"name": "a", **values})


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
        shape(
            sizes=(3, 4),
            angles=(1.5,),
            words=("--dtype", "float 32"),
            folded=False,
            machine="there",
        ),
        Colour(hue=2.0),
        4,
    ]
    assert result.exit_code == 3  # what the command returned


def test_defaults_are_those_of_the_class() -> None:
    result, seen = invoke("--name", "a")
    assert result.exit_code == 0, result.output
    assert seen == [shape(), Colour(), 1]
    assert invoke("--name", "a", "--sizes", "")[1][0] == shape(sizes=())


def test_a_command_may_show_some_fields_with_other_defaults() -> None:
    options = {"shown": ["sizes", "hue"], "defaults": {"name": "b", "sizes": (5,), "hue": 1.0}}
    assert invoke(**options)[1][:2] == [shape(name="b", sizes=(5,)), Colour(hue=1.0)]
    found = invoke("--sizes", "6", "--hue", "2", **options)[1][:2]
    assert found == [shape(name="b", sizes=(6,)), Colour(hue=2.0)]
    assert invoke("--folded", **options)[0].exit_code == 2


def test_help_is_the_description_of_a_field() -> None:
    text = invoke("--help")[0].output
    for said in ("Draw a shape.", "Numbers, separated by commas. [default: 1,2]", "0,0.5", "--hue"):
        assert said in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "1,x"], "--sizes is 'x': give a whole number"),
        (["--kind", "ink"], "--kind is 'ink': use one of oil, chalk"),
        (["--sizes", "-1"], "--sizes has a negative one"),
        (["--serve", "'"], "--serve ': No closing quotation"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    result, seen = invoke("--name", "a", *words)
    assert (result.exit_code, seen) == (1, [])
    assert result.stderr.startswith(f"vispec: {said}")
    assert result.stderr.count("\n") == 1
