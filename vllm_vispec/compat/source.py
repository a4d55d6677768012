"""Looks symbols up in vLLM's source files without importing them."""

import ast
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@lru_cache(maxsize=64)
def parse_module(module: str) -> ast.Module | None:
    """Return the syntax tree of a vLLM module, or None if the installed vLLM lacks it."""
    root = find_spec("vllm")
    if root is None or not root.submodule_search_locations:
        return None
    relative = module.split(".")[1:]
    for folder in root.submodule_search_locations:
        path = Path(folder, *relative).with_suffix(".py")
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def find_symbol(tree: ast.Module, symbol: str) -> ast.AST | None:
    """Return where ``name``, ``Class.method`` or ``Class.self.attribute`` is defined, or None."""
    owner, _, attribute = symbol.partition(".self.")
    if attribute:
        scope = find_symbol(tree, owner)
        return None if scope is None else _find_attribute(scope, attribute)
    scope = tree
    for name in symbol.split("."):
        scope = next((node for node in _definitions(scope) if _name_of(node) == name), None)
        if scope is None:
            return None
    return scope


def _definitions(scope: ast.AST) -> Iterator[ast.AST]:
    return iter(getattr(scope, "body", ()))


def _name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _find_attribute(scope: ast.AST, name: str) -> ast.AST | None:
    for node in ast.walk(scope):
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and node.attr == name:  # type: ignore[attr-defined]
            return node
    return None


def parameter_names(node: ast.AST) -> list[str]:
    """Return a function's parameters in order; empty for anything else."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    arguments = node.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
