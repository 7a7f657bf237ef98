"""Splitting a model's feed-forwards into experts, and choosing how many run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softlms.layers import LowRankLinear
from softlms.methods.dynamic_moe.experts import Experts, Passed
from softlms.methods.dynamic_moe.split import SPLITS, check_experts
from softlms.methods.feed_forward import FeedForward, feed_forwards, name_activation
from softlms.modules import as_linear, replace
from softlms.origin import remember

__all__ = ["experts_of", "put_experts", "set_threshold"]

WHO = "Experts"


def put_experts(
    model: PreTrainedModel,
    experts: int,
    *,
    split: str = "kmeans",
    hidden: int = 128,
    signed: bool = False,
    seed: int = 0,
) -> dict[str, Experts]:
    """Split every feed-forward, in place; the model computes what it did until a threshold below 1 is set.

    Parameters
    ----------
    model : PreTrainedModel
        BERT, GPT-2 or Llama, its linears dense or low rank. Experts divide the neurons between the two linears; thin
        products to and from them are shared by all experts.
    experts : int
        E, of equal size.
    split : {"kmeans", "random"}
    hidden, signed
        Of the routers; see `softlms.methods.dynamic_moe.experts.Router`.
    seed : int

    Returns
    -------
    dict
        The experts of each block by name. Their routers have arbitrary values.

    Raises
    ------
    ValueError
        Another family, a block that has experts already, experts that do not divide the neurons, linears that are
        neither dense nor low rank, or an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}.")
    parts = feed_forwards(model, WHO)
    for part in parts:
        for name in (*part.enters, part.leaves):
            check_linear(name, model.get_submodule(name))
        check_experts(_weight(model.get_submodule(part.enters[-1])).shape[0], experts)
    remember(model)
    made = {}
    for number, part in enumerate(parts):
        members = SPLITS[split](_weight(model.get_submodule(part.enters[-1])), experts, seed + number)
        made[part.name] = _split(model, part, members, {"hidden": hidden, "signed": signed})
    return made


def check_linear(name: str, layer: nn.Module) -> None:
    """Raise ValueError for a layer that is neither dense nor low rank."""
    if not isinstance(layer, nn.Linear | Conv1D | LowRankLinear):
        raise ValueError(f"{name} is a {type(layer).__name__}: experts divide dense and low-rank linears. Deploy it.")


@torch.no_grad()
def _split(model: PreTrainedModel, part: FeedForward, members: Tensor, router: dict[str, Any]) -> Experts:
    enters = [_thin(model.get_submodule(name)) for name in part.enters]
    (V, behind, c), (U, before, b) = _thin(model.get_submodule(part.leaves), leaving=True), enters[-1]
    if len(enters) > 1:  # two thin products before the experts would not be shared
        enters = [_whole(model.get_submodule(name)) for name in part.enters]
        U, before, b = enters[-1]
    holder: Any = model.get_submodule(part.name)
    dropout = getattr(holder, "dropout", None) if part.leaves.startswith(f"{part.name}.") else None
    made = Experts(
        U.shape[1] if before is None else before.shape[1],
        *members.shape,
        inner=(None if before is None else len(before), None if behind is None else behind.shape[1]),
        gated=len(enters) > 1,
        entering_bias=b is not None,
        leaving_bias=c is not None,
        activation=name_activation(model),
        dropout=0.0 if dropout is None else dropout.p,
        **router,
    ).to(U.device, U.dtype)
    made.U.copy_(U[members])
    made.V.copy_(V.T[members])
    if made.b is not None:
        made.b.copy_(b[members])
    if made.c is not None:
        made.c.copy_(c)
    if made.G is not None:
        G, _, g = enters[0]
        made.G.copy_(G[members])
        if made.g is not None:
            made.g.copy_(g[members])
    if made.before is not None:
        made.before.weight.copy_(before)
    if made.behind is not None:
        made.behind.weight.copy_(behind)
    if not part.leaves.startswith(f"{part.name}."):
        replace(model, part.leaves, Passed())
    replace(model, part.name, made)
    return made


def _weight(layer: Any) -> Tensor:
    """The weight as (m, n), of any form."""
    linear = as_linear(layer) if isinstance(layer, nn.Linear | Conv1D) else layer
    weight = linear.weight
    return weight @ torch.eye(weight.shape[1], device=weight.device) if isinstance(layer, LowRankLinear) else weight


def _whole(layer: Any) -> tuple[Tensor, None, Any]:
    return _weight(layer), None, layer.bias


def _thin(layer: Any, *, leaving: bool = False) -> tuple[Tensor, Any, Any]:
    """The matrix at the neurons, the thin one on their other side if there is one, and the bias."""
    if not isinstance(layer, LowRankLinear):
        return _whole(layer)
    if leaving:  # y = up(down(h))
        return layer.down.weight, layer.up.weight, layer.bias
    return layer.up.weight, layer.down.weight, layer.bias


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """The experts of each block by name; ValueError if there are none."""
    found = dict(_named(model))
    if not found:
        raise ValueError(f"This {type(model).__name__} has no experts: split it first, with the method experts.")
    return found


def _named(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, module


def set_threshold(model: nn.Module, tau: float | None = None, *, top: int | None = None) -> None:
    """Choose which experts run, without training.

    Parameters
    ----------
    model : nn.Module
        With experts.
    tau : float, optional
        An expert runs where its router gives at least 1 - tau of the largest: 0 to 1, which runs all.
    top : int, optional
        Instead: as many experts for every token.

    Raises
    ------
    ValueError
        Both or neither are given, a value is out of range, the model has no experts, or their routers were never
        trained.
    """
    every = experts_of(model)
    most = min(len(experts.U) for experts in every.values())
    if (tau is None) == (top is None):
        raise ValueError("Give tau, or top: how much, or how many.")
    if tau is not None and not 0 <= tau <= 1:
        raise ValueError(f"tau is a share, 0 to 1; got {tau!r}.")
    if top is not None and not 1 <= top <= most:
        raise ValueError(f"top is a number of experts, 1 to {most}; got {top!r}.")
    if tau != 1 and (untrained := [name for name, experts in every.items() if not experts.trained]):
        raise ValueError(f"The router of {untrained[0]} was never trained: use the method experts, or tau = 1.")
    for experts in every.values():
        experts.tau, experts.top = 1.0 if tau is None else tau, top
        experts.start_counting()
