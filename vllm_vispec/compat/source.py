"""Looks symbols up in vLLM's source text without importing it.

Definitions are found by a search for their first line, which costs about a thousandth of parsing a
module.  Whatever that does not find is looked for in the syntax tree, so nothing is called missing
because of the way it is laid out.
"""

import ast
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

# A class ends where the next statement stands in column 0.
_NEXT_STATEMENT = re.compile(r"^[A-Za-z_@]", re.MULTILINE)
_MEMBER_INDENT = "    "
_MAX_SIGNATURE_LINES = 100


# A handful of texts at a time: entries of one module stand together, and texts are not small.
@lru_cache(maxsize=8)
def read_module(module: str) -> str | None:
    """Return the source of a vLLM module, or None if the installed vLLM lacks it."""
    root = find_spec("vllm")
    if root is None or not root.submodule_search_locations:
        return None
    relative = module.split(".")[1:]
    for folder in root.submodule_search_locations:
        path = Path(folder, *relative)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    return None


def find_parameters(text: str, symbol: str) -> list[str] | None:
    """Return the parameters of a symbol that a module defines, None if it does not define it.

    Args:
        text: The module's source.
        symbol: ``name``, ``Class``, ``Class.method`` or ``Class.self.attribute``.

    Returns:
        A function's parameters in order; an empty list for anything else.
    """
    found = _scan(text, symbol)
    if found is None:
        found = _parse(text, symbol)
    return found


def _scan(text: str, symbol: str) -> list[str] | None:
    """Search the text for lines that define the symbol; None if that does not settle it."""
    owner, _, attribute = symbol.partition(".self.")
    if attribute:
        body = _class_body(text, owner)
        stored = rf"\.{attribute}\b(?:\s*:[^=\n]+)?\s*=(?!=)"
        return [] if body is not None and re.search(stored, body) else None
    owner, _, name = symbol.rpartition(".")
    scope = _class_body(text, owner) if owner else text
    if scope is None:
        return None
    indent = _MEMBER_INDENT if owner else ""
    function = re.search(rf"^{indent}(?:async )?def {name}\(", scope, re.MULTILINE)
    if function is not None:
        return _parameters_at(scope[function.start() :], nested=bool(owner))
    other = rf"^{indent}(?:class {name}\b|{name}\s*(?::|=(?!=)))"
    return [] if re.search(other, scope, re.MULTILINE) else None


def _class_body(text: str, name: str) -> str | None:
    header = re.search(rf"^class {name}\b", text, re.MULTILINE)
    if header is None:
        return None
    end = _NEXT_STATEMENT.search(text, header.end())
    return text[header.end() : end.start() if end else len(text)]


def _parameters_at(text: str, *, nested: bool) -> list[str] | None:
    """Return the parameters of the function that the text begins with."""
    lines = iter(text.splitlines()[:_MAX_SIGNATURE_LINES])
    signature = "class _:\n" if nested else ""
    for line in lines:
        signature += line + "\n"
        if not line.split("#")[0].rstrip().endswith(":"):
            continue
        try:
            # The next line stands for the body, which may be anything.
            tree = ast.parse(signature + _MEMBER_INDENT * (1 + nested) + "pass\n")
        except SyntaxError:
            continue
        node = tree.body[0]
        return _parameter_names(node.body[0] if isinstance(node, ast.ClassDef) else node)
    return None


def _parse(text: str, symbol: str) -> list[str] | None:
    owner, _, attribute = symbol.partition(".self.")
    node: ast.AST = ast.parse(text)
    for name in owner.split("."):
        found = [child for child in getattr(node, "body", ()) if name in _names_of(child)]
        if not found:
            return None
        node = found[0]
    if not attribute:
        return _parameter_names(node)
    stored = (one for one in ast.walk(node) if isinstance(getattr(one, "ctx", None), ast.Store))
    return [] if attribute in (getattr(one, "attr", None) for one in stored) else None


def _names_of(node: ast.AST) -> set[str]:
    """Return the names that a statement defines."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {getattr(node, "name", ""), *(getattr(target, "id", "") for target in targets)}


def _parameter_names(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    arguments = node.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
