"""The code that a step runs: the definitions of this library that it reaches, in whatever file they are.

A definition is a function, a class or a constant at a module's top level. It reaches the names in it that its module
defines, or imports from another module of the package. Only code that runs is compared: docstrings, comments,
import lines and the file of a definition do not count. So code may move, and stored runs are still found.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["code_behind", "code_of", "library_hash", "not_in_keys"]

PACKAGE = Path(__file__).parents[1]
PARSING = threading.Lock()  # CPython 3.11 fails if two threads parse at once (python/cpython issue 106905)
EFFECTS = "on import"  # the name of statements that define no name
Thing = TypeVar("Thing")


def not_in_keys(thing: Thing) -> Thing:
    """Mark a function, class or method that changes no number, or whose values are in the keys themselves."""
    return thing


@cache
def code_of(*starts: str, package: Path = PACKAGE) -> dict[str, str]:
    """Hashes of these definitions and of all that they reach.

    Parameters
    ----------
    *starts : str
        ``module:name``, such as "softlms.experiments.steps:train_dense".
    package : Path
        The package's folder.

    Returns
    -------
    dict
        Name of a definition to hexadecimal digits. Definitions of the same name share one hash, and so do all
        statements that run when a module is imported and define no name.

    Raises
    ------
    ValueError
        A name or an import that cannot be followed: code would be left out silently.
    """
    modules = _Modules(package)
    waiting = [modules.find(*start.split(":")) for start in starts]
    texts: dict[tuple[str, str], str] = {}
    while waiting:
        module, name = waiting.pop()
        if (module.name, name) in texts:
            continue
        statements = module.definitions.get(name, [])
        texts[module.name, name] = "".join(map(ast.dump, statements))
        waiting += [(module, EFFECTS), *modules.reached(module, statements)]
    together: dict[str, list[str]] = {}
    for (_, name), text in sorted(texts.items(), key=lambda item: (item[0][1], item[1])):
        if text:
            together.setdefault(name, []).append(text)
    return {name: _hash(parts) for name, parts in together.items()}


def code_behind(*things: Any) -> dict[str, str]:
    """`code_of` for functions and classes themselves; those of other packages count with their whole file."""
    starts = {thing: thing.__module__ for thing in things}
    inner = [f"{module}:{thing.__qualname__}" for thing, module in starts.items() if _is_ours(module)]
    files = {inspect.getfile(thing) for thing, module in starts.items() if not _is_ours(module)}
    return code_of(*inner) | {Path(file).name: _hash([Path(file).read_text("utf-8")]) for file in sorted(files)}


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE.name


@cache
def library_hash(package: Path = PACKAGE) -> str:
    """Hash of all code that runs in a package and its subfolders, regardless of the files that hold it."""
    trees = [_Running().visit(_parsed(path)) for path in package.rglob("*.py")]
    return _hash(sorted({ast.dump(statement) for tree in trees for statement in tree.body}))


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


class _Running(ast.NodeTransformer):
    """Removes what does not run: docstrings, and imports, which are followed instead."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        return node if node.body or node.orelse else None  # an import for type checking only


class _Counting(_Running):
    """Also removes what is marked with `not_in_keys`."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return None if _is_marked(node) else self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST | None:
        return None if _is_marked(node) else self.generic_visit(node)


def _is_marked(node: ast.AST) -> bool:
    marks = getattr(node, "decorator_list", [])
    return any(isinstance(mark, ast.Name) and mark.id == not_in_keys.__name__ for mark in marks)


def _parsed(path: Path) -> ast.Module:
    with PARSING:
        return ast.parse(path.read_text("utf-8"))


class _Module:
    """A module's definitions and its imports from the package, also inside functions and for type checking."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        tree = _parsed(path)
        self.imports = self._imports(tree)
        self.definitions = self._definitions(tree)

    def _imports(self, tree: ast.Module) -> dict[str, tuple[str, str]]:
        """Local name to the module and the name in it, "" for the module itself."""
        found: dict[str, tuple[str, str]] = {}
        root = self.name.split(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"{self.name} line {node.lineno}: write the relative import in full.")
                if str(node.module).split(".")[0] == root:
                    found |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == root:
                        found[alias.asname or root] = (alias.name if alias.asname else root, "")
        return found

    def _definitions(self, tree: ast.Module) -> dict[str, list[ast.stmt]]:
        found: dict[str, list[ast.stmt]] = {name: [] for node in tree.body if _is_marked(node) for name in _names(node)}
        for statement in _Counting().visit(tree).body:
            names = [name for name in _names(statement) if name not in self.imports]
            for name in names or [EFFECTS]:
                found.setdefault(name, []).append(statement)
        return found


def _names(statement: ast.stmt) -> list[str]:
    """Names that a statement at the top level defines or changes."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.If, ast.Try, ast.With)):
        handlers = statement.handlers if isinstance(statement, ast.Try) else []
        inner = [part for block in (statement, *handlers) for part in block.body]
        inner += getattr(statement, "orelse", [])
        return list(dict.fromkeys(name for part in inner for name in _names(part)))
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [name for target in targets for name in _bases(target)]
    return []


def _bases(target: ast.expr) -> list[str]:
    """``a`` of ``a``, ``a[0]`` and ``a.b``."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for part in target.elts for name in _bases(part)]
    while isinstance(target, (ast.Subscript, ast.Attribute)):
        target = target.value
    return [target.id] if isinstance(target, ast.Name) else []


class _Modules:
    """The package's modules by their dotted names."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.read: dict[str, _Module] = {}

    def file(self, dotted: str) -> Path | None:
        place = self.package.parent.joinpath(*dotted.split("."))
        return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)

    def module(self, dotted: str) -> _Module:
        if dotted not in self.read:
            file = self.file(dotted)
            if file is None:
                raise ValueError(f"{dotted} is no module of {self.package}.")
            self.read[dotted] = _Module(dotted, file)
        return self.read[dotted]

    def find(self, dotted: str, name: str) -> tuple[_Module, str]:
        """The module that defines a name, through modules that only re-export it."""
        module = self.module(dotted)
        if name in module.definitions:
            return module, name
        if name in module.imports:
            return self.find(*module.imports[name])
        raise ValueError(f"{dotted} does not define {name!r}.")

    def reached(self, module: _Module, statements: list[ast.stmt]) -> Iterator[tuple[_Module, str]]:
        for node in (node for statement in statements for node in ast.walk(statement)):
            if isinstance(node, ast.Name):
                if node.id in module.definitions:
                    yield module, node.id
                elif node.id in module.imports and self._whole(module, node.id) is None:
                    yield self.find(*module.imports[node.id])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                whole = self._whole(module, node.value.id)
                if whole is not None:  # `text` of the module corpus in `corpus.text`
                    yield self.find(whole, node.attr)

    def _whole(self, module: _Module, name: str) -> str | None:
        """The module that a name refers to, if it refers to one."""
        dotted, inner = module.imports.get(name, ("", ""))
        whole = f"{dotted}.{inner}" if inner else dotted
        return whole if dotted and self.file(whole) else None
