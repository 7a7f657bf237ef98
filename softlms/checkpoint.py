"""Save a deployed model at its compressed size, and load it again.

A folder holds the model's own ``config.json``, its weights (``softlms.safetensors``) and ``softlms.json``: the ranks,
and whatever the maker noted. The weights' name is not one that transformers looks for: its ``from_pretrained`` fails on
such a folder instead of filling a full-size model with random values.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from softlms.architectures import find_targets
from softlms.fused import split_fused
from softlms.layers import LowRankLinear, SoftLinear
from softlms.surgery import shrink

__all__ = ["load_compressed", "save_compressed"]

FORMAT = 1
WEIGHTS, CARD = "softlms.safetensors", "softlms.json"


def save_compressed(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: dict[str, Any] | None = None,
) -> Path:
    """Write a deployed model; the folder appears whole or not at all.

    Parameters
    ----------
    model : PreTrainedModel
        After `softlms.deploy` or `softlms.truncate`, of a family in `softlms.ARCHITECTURES`.
    folder : str or Path
        Must not exist, or be empty.
    tokenizer : PreTrainedTokenizerBase, optional
        Saved beside the model.
    notes : dict, optional
        What JSON can hold: metrics, data, how it was made.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        A layer is still in its soft form, or was chosen by ``targets``, or the family is unknown.
    FileExistsError
        The folder holds something.
    """
    folder = Path(folder)
    targets = find_targets(model)
    factored = {n: m for n, m in model.named_modules() if isinstance(m, (SoftLinear, LowRankLinear))}
    if any(isinstance(module, SoftLinear) for module in factored.values()):
        raise ValueError("The model is in its soft form: call softlms.deploy(model) first.")
    if others := sorted(factored.keys() - {target.name for target in targets}):
        raise ValueError(f"{others[0]} was chosen by targets=...: only a family's own targets can be saved yet.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: choose another folder, or remove it.")
    card = {
        "format": FORMAT,
        "class": type(model).__name__,
        "attention": model.config._attn_implementation,  # implementations differ in the last bits
        "ranks": {t.name: getattr(t.module, "rank", min(t.shape)) for t in targets},
        "notes": notes or {},
    }
    partial = folder.with_name(f"{folder.name}.saving")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.config.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    places: dict[int, Tensor] = {}  # what is tied is written once
    state = {n: v.contiguous() for n, v in model.state_dict().items() if places.setdefault(v.data_ptr(), v) is v}
    save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
    (partial / CARD).write_text(json.dumps(card, indent=1))
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return folder


def load_compressed(folder: str | Path, *, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load what `save_compressed` wrote: the same outputs, bit for bit, at the compressed size, in eval mode.

    Parameters
    ----------
    folder : str or Path
    attn_implementation : str, optional
        As for ``from_pretrained``; that of the saved model when not given. Another one ("sdpa" on a GPU, say) moves the
        outputs by rounding.

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is missing.
    ValueError
        It was written by a newer format.
    RuntimeError
        The weights do not fit the ranks.
    """
    folder = Path(folder)
    for name in (CARD, WEIGHTS, "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no compressed model: {name} is missing.")
    card = json.loads((folder / CARD).read_text())
    if card["format"] > FORMAT:
        raise ValueError(f"{folder} has format {card['format']}, this softlms knows {FORMAT}: update softlms.")
    config = AutoConfig.from_pretrained(folder, attn_implementation=attn_implementation or card["attention"])
    state = load_file(folder / WEIGHTS)
    model: PreTrainedModel = getattr(transformers, card["class"])(config)
    if any(name.endswith("c_attn.q") for name in card["ranks"]):
        split_fused(model)
    shrink(model, card["ranks"], targets=lambda name, module: name in card["ranks"])
    model.to(next(iter(state.values())).dtype)
    own = model.state_dict()
    tied = {own[name].data_ptr(): values for name, values in state.items() if name in own}
    model.load_state_dict({n: tied[v.data_ptr()] for n, v in own.items() if v.data_ptr() in tied} | state)
    return model.eval()
