"""From a YAML recipe and `--set a.b=c` to a checked `TrainConfig`; the table of all settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from vllm_vispec.train.config import TrainConfig
from vllm_vispec.utils.errors import ViSpecError

_SHORT = (
    "With --set and --override the section may be left out of a name that no other section has: "
    "--set compressor=select"
)


def load_config(recipe: str | Path | None, assignments: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and apply assignments on top.

    Args:
        recipe: a YAML file with the sections of `TrainConfig`; None = defaults only.
        assignments: "section.name=value", the value as YAML; see `full_name`.

    Raises:
        ViSpecError: the file cannot be read, or a key or value is wrong; an unknown key is
            reported with the nearest known one.
    """
    content: dict[str, Any] = {} if recipe is None else _read(Path(recipe))
    flat = _flatten(content)
    for text in assignments:
        name, value = _assignment(text)
        _take(flat, full_name(name), value)
    return config_from_flat(flat)


def config_from_flat(flat: Mapping[str, Any]) -> TrainConfig:
    """A config from dotted names, e.g. {"optimizer.lr": 3e-5}.

    Raises:
        ViSpecError: a key is unknown or a value of the wrong type.
    """
    known = {name: (section, item) for name, section, item in iter_settings()}
    chosen: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        if name not in known:
            raise ViSpecError(_unknown(name, list(known)))
        section, item = known[name]
        kind = get_type_hints(section)[item.name]
        chosen.setdefault(name.split(".")[0], {})[item.name] = _convert(name, value, kind)
    sections = {name: section(**chosen.get(name, {})) for name, section in _sections().items()}
    return TrainConfig(**sections)


def iter_settings() -> Iterator[tuple[str, type, Field[Any]]]:
    """Every setting as (dotted name, its section, its field), in the order of the sections."""
    for name, section in _sections().items():
        for item in fields(section):
            yield f"{name}.{item.name}", section, item


def full_name(name: str) -> str:
    """A setting's dotted name; its section may be left out where no other has such a setting.

    Raises:
        ViSpecError: several sections have one; names them.
    """
    if "." in name:
        return name
    found = [known for known, _, item in iter_settings() if item.name == name]
    if len(found) > 1:
        raise ViSpecError(
            f"setting {name!r} is in several sections: write {' or '.join(found)} in full"
        )
    return found[0] if found else name


def explain() -> str:
    """A text table of every setting: name, default, meaning, source of the default."""
    rows = []
    for name, _, item in iter_settings():
        default = item.default if item.default is not MISSING else {}
        choices = item.metadata["choices"]
        meaning = item.metadata["meaning"] + (f" ({' | '.join(choices)})" if choices else "")
        rows.append((name, _show(default), meaning, item.metadata["source"]))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [
        f"{name:<{widths[0]}}  {default:<{widths[1]}}  {meaning}  [{source}]"
        for name, default, meaning, source in rows
    ]
    return "\n".join((*lines, "", _SHORT))


def _sections() -> dict[str, Any]:
    return dict(get_type_hints(TrainConfig))


def _read(recipe: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ViSpecError(f"recipe {recipe} cannot be read ({error}): give a YAML file") from error
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ViSpecError(f"recipe {recipe} is no YAML ({line}): correct it") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ViSpecError(f"recipe {recipe} holds no sections: see examples/recipes")
    return content


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    sections = list(_sections())
    for section, values in content.items():
        if section not in sections:
            raise ViSpecError(_unknown(str(section), sections))
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ViSpecError(f"{section} is {values!r}: give a section with settings below it")
        flat.update({f"{section}.{name}": value for name, value in values.items()})
    return flat


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    name, separator, value = text.partition("=")
    if not separator:
        raise ViSpecError(f"--set {text!r} has no '=': write --set section.name=value")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ViSpecError(f"--set {text!r}: the value is no YAML, quote it") from error


def _take(flat: dict[str, Any], name: str, value: Any) -> None:
    """Assign; `loss.weights.prob` changes one entry of a mapping."""
    parts = name.split(".")
    if len(parts) == 3:
        owner = ".".join(parts[:2])
        flat[owner] = {**(flat.get(owner) or {}), parts[2]: value}
    else:
        flat[name] = value


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        tails = {item.rpartition(".")[2]: item for item in known}
        near = [tails[t] for t in get_close_matches(name.rpartition(".")[2], tails, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "see `vispec train --explain`"
    return f"setting {name!r} is unknown: {hint}"


def _convert(name: str, value: Any, kind: Any) -> Any:
    text = str(getattr(kind, "__name__", kind))
    converter = next(make for prefix, make in _CONVERTERS.items() if text.startswith(prefix))
    try:
        return converter(value)
    except (TypeError, ValueError) as error:
        raise ViSpecError(f"{name} is {value!r}: give {_WANTED[converter.__name__]}") from error


def _to_str(value: Any) -> str:
    if value is None:
        return ""
    # YAML 1.1 reads `off` and `on` as booleans; both are values of string settings here.
    if isinstance(value, bool):
        return "on" if value else "off"
    if not isinstance(value, (str, int, float)):
        raise TypeError
    return str(value)


def _to_int(value: Any) -> int:
    number = _to_float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _to_float(value: Any) -> float:
    # PyYAML reads 3e-5 (no dot) as a string.
    if isinstance(value, bool) or value is None:
        raise TypeError
    return float(value)


def _to_strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(_to_str(item) for item in value)


def _to_weights(value: Any) -> dict[str, float]:
    return {str(name): _to_float(number) for name, number in dict(value or {}).items()}


_CONVERTERS: dict[str, Any] = {
    "str": _to_str,
    "int": _to_int,
    "float": _to_float,
    "tuple": _to_strings,
    "Mapping": _to_weights,
}
_WANTED = {
    "_to_str": "a text",
    "_to_int": "a whole number",
    "_to_float": "a number",
    "_to_strings": "a list of texts",
    "_to_weights": "name: number pairs",
}


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in ("", (), {}) else "-"
