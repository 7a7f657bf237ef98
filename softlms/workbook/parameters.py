"""Parameters of notebooks, checked against what each notebook declares before any of them runs.

papermill only warns about an unknown name, and accepts every value.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import papermill

__all__ = ["assign_parameters", "parse_value", "split_assignments"]

OPTIONS = ("profile", "data", "model", "text")  # these have an option of their own


def split_assignments(pairs: Sequence[str]) -> dict[str, str]:
    """``name=value`` strings as a mapping.

    Raises
    ------
    ValueError
        No equals sign, a name twice, or one that has an option of its own.

    Examples
    --------
    >>> split_assignments(["tasks=mrpc,cola", "stored_only=true"])
    {'tasks': 'mrpc,cola', 'stored_only': 'true'}
    """
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"-p {pair!r} is not a parameter: write -p name=value.")
        if name in OPTIONS:
            raise ValueError(f"-p {pair!r}: write --{name} instead.")
        if name in given:
            raise ValueError(f"Parameter {name!r} is given twice: {given[name]!r} and {value!r}.")
        given[name] = value
    return given


def assign_parameters(notebooks: Sequence[Path], given: Mapping[str, str]) -> dict[Path, dict[str, Any]]:
    """The parameters of each notebook: the given ones that it declares, each with its default's type.

    Parameters
    ----------
    notebooks : sequence of Path
    given : mapping
        Name to value, as typed.

    Raises
    ------
    ValueError
        No notebook declares a name, a value differs in type from its default, or a default is not a literal.
    """
    declared = {notebook: _declared(notebook) for notebook in notebooks}
    for name in given:
        if not any(name in defaults for defaults in declared.values()):
            known = sorted({name for defaults in declared.values() for name in defaults})
            books = ", ".join(notebook.stem for notebook in notebooks)
            raise ValueError(f"Unknown parameter {name!r}: none of {books} has it; known: {', '.join(known)}.")
    return {
        notebook: {name: parse_value(name, given[name], defaults[name]) for name in given if name in defaults}
        for notebook, defaults in declared.items()
    }


def parse_value(name: str, text: str, default: Any) -> Any:
    """A typed text as a value of its default's type; a tuple becomes a list, because papermill writes no tuples.

    Raises
    ------
    ValueError
        The text is not of that type.

    Examples
    --------
    >>> parse_value("rate", "1e-3", 0.1), parse_value("stored_only", "true", False), parse_value("seeds", "(0, 1)", [])
    (0.001, True, [0, 1])
    """
    kind = type(default)
    try:
        if kind is str:
            # a folder, recognized by its slash, is relative to the user's folder; the notebook runs elsewhere
            folder = Path(text).expanduser()
            return str(folder.resolve()) if "/" in text and folder.is_dir() else text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        value = ast.literal_eval(text)
    except (ValueError, KeyError, SyntaxError):
        value = None
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        return list(value)
    if kind is dict and isinstance(value, dict):
        return value
    expected = {bool: "true or false", tuple: "list", int: "whole number", float: "number"}.get(kind, kind.__name__)
    raise ValueError(f"Parameter {name!r} is {text!r}; expected: {expected}, such as {default!r}.")


def _declared(notebook: Path) -> dict[str, Any]:
    """Names and defaults in a notebook's parameters cell."""
    defaults = {}
    for name, parameter in papermill.inspect_notebook(notebook).items():
        default = parameter["default"]
        try:
            defaults[name] = ast.literal_eval(default)
        except (ValueError, SyntaxError):
            raise ValueError(f"{notebook.name}: the default of {name!r} is {default}, not a literal.") from None
    return defaults
