"""Llama models in GGUF files, as llama.cpp stores them: checked, and read as ordinary float32 models."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GgufConfig

__all__ = ["check_gguf", "from_gguf", "is_gguf"]

ARCHITECTURE = "llama"  # others are stored with other permutations of their weights; only this one is tested


def is_gguf(location: str | Path) -> bool:
    """Whether a location is the name of a GGUF file."""
    return Path(location).suffix == ".gguf"


def check_gguf(file: Path) -> None:
    """Read the file's header and check that all its tensors are there; about two seconds the first time.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ImportError
        The package gguf is missing.
    ValueError
        The file is damaged or truncated, or the model is not a Llama.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: install or fetch it again.")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{file.name} is read with the package gguf, which is missing: pip install softlms[smollm2].")
    found = _architecture(file, file.stat().st_size, file.stat().st_mtime_ns)
    if found != ARCHITECTURE:
        raise ValueError(f"{file} is a {found} model, and only Llama is read from GGUF: give a folder or a hub name.")


@cache
def _architecture(file: Path, size: int, changed: int) -> str:
    """The model's family; size and time in the arguments tell the cache when the file has changed."""
    from gguf import GGUFReader

    try:
        return str(GGUFReader(file).fields["general.architecture"].contents())
    except Exception as error:  # the reader follows the file's own counts and offsets wherever they lead
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{file} is damaged or not complete, install or fetch it again ({reason}).") from error


def from_gguf(kind: Any, file: Path, **options: Any) -> Any:
    """``kind.from_pretrained`` for a GGUF file: a configuration, a tokenizer, or a model.

    A model's weights are dequantized, to float32 by default: about 20 s for 135 million parameters, most of it for
    reading the vocabulary. Saved with ``save_pretrained`` it is an ordinary model, which loads in a second.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As from `check_gguf`.
    """
    check_gguf(file)
    if kind not in (AutoConfig, AutoTokenizer):
        # kept in its blocks, transformers 5.23 refuses to save it
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)} | options
    return kind.from_pretrained(file.parent, gguf_file=file.name, **options)
