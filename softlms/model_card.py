"""The README of a saved model: its size, ranks and scores, and how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from softlms.budget import count_parameters
from softlms.layers import LowRankLinear, SoftLinear
from softlms.modules import Replacement

__all__ = ["class_name", "is_ours", "notes", "plain", "write_card"]

TAGS = ("softlms", "low-rank", "model-compression")
MARK = "compressed by softlms"
TEMPLATE = "has been automatically generated"  # in the hub's empty card


def is_ours(card: Path) -> bool:
    """Whether a model card may be written here: there is none, it is one of ours, or the hub's empty template."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else MARK
    return MARK in text or TEMPLATE in text


def notes(config: PreTrainedConfig) -> dict[str, Any]:
    """Content of ``config.softlms`` for the model card. NumPy numbers and paths become plain values.

    A value other than a dict becomes a dict with the single entry "note".

    Returns
    -------
    dict
        Empty if there is none.

    Raises
    ------
    ValueError
        JSON cannot store an entry.
    """
    held = getattr(config, "softlms", None)
    if held is None:
        return {}
    return dict(plain(held if isinstance(held, Mapping) else {"note": held}, "model.config.softlms"))


def plain(value: Any, place: str) -> Any:
    """Convert a value to JSON types; a ValueError names what in `place` JSON cannot store."""
    if isinstance(value, Mapping):
        return {_key(name, place): plain(entry, f"{place}[{name!r}]") for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, PurePath):
        return str(value)
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise ValueError(
            f"{place} is of {type(value)}, which JSON cannot store: make it a number, string, list or dict."
        )
    return value


def _key(name: Any, place: str) -> str:
    if not isinstance(name, (str, int)):
        raise ValueError(f"{place} has the key {name!r}: use strings as keys.")
    return str(name)


def write_card(model: PreTrainedModel, folder: Path, tags: Sequence[str] = ()) -> None:
    """Write ``README.md``, with the front matter that the hub reads.

    Parameters
    ----------
    model : PreTrainedModel
        With factored layers. The content of ``model.config.softlms`` (metrics, data, settings) is shown; see `notes`.
    folder : Path
    tags : sequence of str
        In addition to our own.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (SoftLinear, LowRankLinear))}
    base = [f"base_model: {model.config.name_or_path}"] if _is_hub_name(model.config.name_or_path) else []
    lines = [
        "---",
        "library_name: transformers",
        *base,
        f"tags: [{', '.join(dict.fromkeys((*TAGS, *tags)))}]",
        "---",
        "",
    ]
    lines += [f"# {class_name(model)}, {MARK}", ""]
    lines += [f"{_forms(model)}. {_size(model, layers)}".rstrip(), ""]
    lines += ["```python", "import softlms  # from_pretrained needs this import", ""]
    lines += [f"from transformers import {class_name(model)}", ""]
    lines += [f"model = {class_name(model)}.from_pretrained(...)", "```", ""]
    if held := notes(model.config):
        lines += ["## How it was made", "", "| | |", "|---|---|", *_rows(held), ""]
    if layers:
        lines += ["## Ranks", "", "| layer | outputs | inputs | rank |", "|---|---|---|---|"]
        lines += [f"| {n} | {m.out_features} | {m.in_features} | {m.rank} |" for n, m in layers.items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def class_name(model: PreTrainedModel) -> str:
    """Name of the model's own class; FSDP2 puts a subclass of its own in front."""
    return type(model).__name__.removeprefix("FSDP")


def _size(model: PreTrainedModel, layers: Mapping[str, Any]) -> str:
    if not layers:
        return ""
    try:
        counted = count_parameters(model, lambda name, module: name in layers)
    except ValueError as error:  # a model with new words, for example, is saved anyway
        return str(error)
    return (
        f"The low-rank ones keep {counted.kept('linear'):.1%} of their dense weights; the model has "
        f"{counted.total:,} of {counted.total_dense:,} parameters, {counted.kept('total'):.1%}."
    )


def _forms(model: PreTrainedModel) -> str:
    counts = Counter(module.form for module in model.modules() if isinstance(module, Replacement))
    return "Layers by form: " + ", ".join(f"{number} {form}" for form, number in sorted(counts.items()))


def _rows(held: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line per value; nested values get dotted names."""
    lines = []
    for name, value in held.items():
        if isinstance(value, Mapping):
            lines += _rows(value, f"{prefix}{name}.")
        else:
            lines.append(
                f"| {prefix}{name} | {value:.4g} |" if isinstance(value, float) else f"| {prefix}{name} | {value} |"
            )
    return lines


def _is_hub_name(name: str) -> bool:
    return bool(name) and name.count("/") <= 1 and not Path(name).exists()
