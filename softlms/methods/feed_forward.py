"""The feed-forward of each block: its linears, and the activation between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softlms.modules import Attached, Replacement

__all__ = ["FeedForward", "feed_forwards", "name_activation", "set_activation"]


@dataclass(frozen=True)
class FeedForward:
    """Names in a model of one block's feed-forward.

    Attributes
    ----------
    name : str
        The module that holds it, or its first half.
    enters : tuple of str
        The linears that read the block's state: one, or gate and up.
    activation : str
        The module that holds the activation, and its attribute there.
    leaves : str
        The linear back to the block's state.
    """

    name: str
    enters: tuple[str, ...]
    activation: tuple[str, str]
    leaves: str


# model type: name in a block of what holds it; entering linears; activation's attribute; leaving linear
FAMILIES: Mapping[str, tuple[str, tuple[str, ...], str, str]] = {
    "bert": ("intermediate", ("intermediate.dense",), "intermediate_act_fn", "output.dense"),
    "gpt2": ("mlp", ("mlp.c_fc",), "act", "mlp.c_proj"),
    "llama": ("mlp", ("mlp.gate_proj", "mlp.up_proj"), "act_fn", "mlp.down_proj"),
}
BLOCKS = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers"}
ACTIVATION = {"bert": "hidden_act", "gpt2": "activation_function", "llama": "hidden_act"}  # in the configuration


def feed_forwards(model: PreTrainedModel, what: str) -> list[FeedForward]:
    """The feed-forward of each block, in order.

    Parameters
    ----------
    model : PreTrainedModel
        BERT, GPT-2 or Llama.
    what : str
        Who needs them, for errors.

    Raises
    ------
    ValueError
        Another family, a block whose feed-forward was replaced, or a model with exits, which come last.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(f"{what} knows the feed-forward of {', '.join(FAMILIES)}; this model is a {family}.")
    if any(isinstance(module, Attached) for module in model.modules()):
        raise ValueError(f"{what}: the model has exits, and they come last: start from the one without.")
    holder, enters, activation, leaves = FAMILIES[family]
    base: Any = model.base_model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    found = []
    for number in range(len(base.get_submodule(BLOCKS[family]))):
        block = f"{prefix}{BLOCKS[family]}.{number}"
        module = model.get_submodule(f"{block}.{holder}")
        if isinstance(module, Replacement):
            raise ValueError(f"{what}: {block}.{holder} is a {type(module).__name__}, which was put there already.")
        names = tuple(f"{block}.{name}" for name in enters)
        found.append(FeedForward(f"{block}.{holder}", names, (f"{block}.{holder}", activation), f"{block}.{leaves}"))
    return found


def name_activation(model: PreTrainedModel, name: str | None = None) -> str:
    """The name of the feed-forward's activation in the configuration; a given one is written there first."""
    entry = ACTIVATION[model.config.model_type]
    if name is not None:
        setattr(model.config, entry, name)
    known: str = getattr(model.config, entry)
    return known


def set_activation(model: PreTrainedModel, part: FeedForward, activation: nn.Module) -> None:
    """Put another activation in."""
    holder, attribute = part.activation
    setattr(model.get_submodule(holder), attribute, activation)
