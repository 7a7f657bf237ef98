"""The embedded corpus: real English found on every machine, the docstrings of installed libraries.

Source files are parsed, never imported. The content depends on the installed versions, so numbers measured on it are
comparable only on one machine. It is named wherever it is used; nothing falls back to it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["LIBRARIES", "SMALL_LIBRARIES", "docstrings", "sentence_pairs", "text"]

LIBRARIES: tuple[str, ...] = ("torch", "transformers", "pandas", "numpy", "matplotlib")
SMALL_LIBRARIES = ("pandas", "numpy", "matplotlib")  # prose with little boilerplate, parsed in seconds

_NOT_PROSE = re.compile(r">>>|::|``|:[a-z]+:|\|\s|[=\-~_*^]{3,}|\w+\(|https?:|[{}<>\\]|\.\. ")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)'\"][.!?])\s+(?=[A-Z])")


@cache
def docstrings(libraries: tuple[str, ...]) -> dict[str, list[str]]:
    """Docstrings by source file (``library/path.py``) without tests, both in a fixed order.

    Raises
    ------
    ModuleNotFoundError
        A library is not installed.
    """
    found = {}
    for library in libraries:
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"The embedded corpus reads the docstrings of {library}: install it.")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root.parent)
            if not {"tests", "testing", "_vendor"} & set(relative.parts):
                docs = list(_docstrings_of(path))
                if docs:
                    found[relative.as_posix()] = docs
    return found


def text(split: str, libraries: tuple[str, ...] = LIBRARIES) -> str:
    """The corpus as plain text for language modelling.

    Parameters
    ----------
    split : {"train", "validation", "test"}
        Source files are assigned to a split by a hash of their path: 80, 10 and 10 %.
    libraries : tuple of str

    Returns
    -------
    str
        Paragraphs separated by blank lines. A paragraph that occurs twice (up to white space) is left out, because
        libraries copy parameter descriptions from place to place. Files are in the order of their hash, so that the
        beginning of a split is as mixed as the whole.

    Raises
    ------
    ValueError
        Unknown split.
    """
    own = {"train": "train", "validation": "dev", "test": "test"}
    if split not in own:
        raise ValueError(f"split must be one of {', '.join(own)}, got {split!r}.")
    paragraphs = {
        name: [paragraph for doc in docs for paragraph in re.split(r"\n\s*\n", doc)]
        for name, docs in docstrings(libraries).items()
    }
    seen = Counter(" ".join(paragraph.split()) for found in paragraphs.values() for paragraph in found)
    files = sorted((name for name in paragraphs if _split_of(name) == own[split]), key=_hash)
    return "\n\n".join(p for name in files for p in paragraphs[name] if seen[" ".join(p.split())] == 1)


@cache
def sentence_pairs(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The ``docpairs`` task: are two sentences adjacent in one docstring?

    A pair with label 1 consists of the first two sentences of a docstring. A pair with label 0 consists of its first
    sentence and the second sentence of a docstring in another source file. So neither length nor the style of an
    opening sentence tells the label, only whether both are about the same thing. Source files are split into train,
    dev and test. A sentence that occurs in two files is not used, so no sentence is in two splits.

    Parameters
    ----------
    seed : int
        Order of the pairs and choice of the label-0 partners.

    Returns
    -------
    dict
        "train", "dev" and "test": rows with "sentence1", "sentence2" and "label" in equal shares.
    """
    files = {n: [_sentences(doc) for doc in docs] for n, docs in docstrings(SMALL_LIBRARIES).items()}
    in_files = Counter(s for docs in files.values() for s in {s for doc in docs for s in doc})
    rng = random.Random(seed)
    pages: dict[str, list[tuple[str, str, str]]] = {"train": [], "dev": [], "test": []}  # file, first, second
    used: set[str] = set()
    for name, docs in files.items():
        for doc in docs:
            own = [s for s in doc if in_files[s] == 1][:2]
            if len(own) == 2 and not used & set(own):  # some docstrings repeat the text of another in the same file
                used.update(own)
                pages[_split_of(name)].append((name, own[0], own[1]))
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in pages}
    for split, rows in splits.items():
        for name, first, second in pages[split]:
            rows.append({"sentence1": first, "sentence2": second, "label": 1})
            other = rng.choice([page for page in pages[split] if page[0] != name])
            rows.append({"sentence1": first, "sentence2": other[2], "label": 0})
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node)
            if doc:
                yield doc


def _sentences(doc: str) -> list[str]:
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", doc))
    sentences = (s for p in paragraphs if not _NOT_PROSE.search(p) for s in _SENTENCE_END.split(p))
    return [s for s in sentences if 5 <= len(s.split()) <= 30 and s.endswith((".", "!", "?"))]


def _split_of(file: str) -> str:
    return {0: "dev", 1: "test"}.get(_hash(file) % 10, "train")


def _hash(file: str) -> int:
    return int(hashlib.sha256(file.encode()).hexdigest(), 16)
