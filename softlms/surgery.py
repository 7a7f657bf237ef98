"""Three verbs that change a model in place: `decompose` and `deploy` for learned ranks, `truncate` for given ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from softlms.architectures import Predicate, find_targets
from softlms.layers import LowRankLinear, SoftLinear, kept_parameters, svd

__all__ = ["decompose", "deploy", "ranks", "soft_layers", "truncate"]

M = TypeVar("M", bound=nn.Module)


def decompose(
    model: M, *, alpha: float = 0.0, s: float = 50.0, relative: bool = False, targets: Predicate | None = None
) -> M:
    """Replace every target linear by its SVD with a learnable threshold; the outputs stay the same.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    alpha, s, relative
        Start of each threshold, its sharpness, and whether alpha counts in multiples of the layer's largest
        singular value; see `SoftLinear.from_linear`.
    targets : callable, optional
        Chooses the layers; see `find_targets`.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        The model is decomposed already, its family is unknown, a weight is NaN, infinite, all zeros, shared or
        quantized, or alpha or s is out of range. Nothing has been changed then.
    """
    for name, linear in _dense_targets(model, targets).items():
        soft = SoftLinear.from_linear(linear, alpha=alpha, s=s, relative=relative)
        model.set_submodule(name, soft.train(linear.training))
    return model


def truncate(model: M, ranks: Mapping[str, int], *, targets: Predicate | None = None) -> M:
    """Replace every target linear by its truncated SVD of the given rank (Eckart-Young): the static baseline.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    ranks : mapping
        Components to keep of each target, by name. A layer that would not get smaller stays dense.
    targets : callable, optional
        Chooses the layers; see `find_targets`.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        As in `decompose`; or `ranks` misses a layer, names one that is no target, or a rank is out of range.
        Nothing has been changed then.
    """
    linears = _dense_targets(model, targets)
    if linears.keys() != ranks.keys():
        raise ValueError(
            f"ranks must name each target once; missing or unknown: {sorted(linears.keys() ^ ranks.keys())}."
        )
    for name, linear in linears.items():
        if not 1 <= ranks[name] <= min(linear.weight.shape):
            raise ValueError(f"Rank of {name} must be 1 to {min(linear.weight.shape)}, got {ranks[name]}.")
    for name, linear in linears.items():
        rank, weight = ranks[name], linear.weight
        if kept_parameters(linear.out_features, linear.in_features, rank) < weight.numel():
            U, sigma, V = (factor[..., :rank].to(weight.dtype) for factor in svd(weight))
            layer = LowRankLinear(V.T, U * sigma, linear.bias)
            model.set_submodule(name, layer.train(linear.training))
    return model


def deploy(model: M) -> M:
    """Cut every soft layer to its live components and fold T(sigma) in: thin matmuls, or dense where not larger.

    Parameters
    ----------
    model : nn.Module
        A decomposed model, changed in place.

    Returns
    -------
    nn.Module
        `model` itself; its outputs are those of the soft form.

    Raises
    ------
    ValueError
        The model was never decomposed.
    """
    for name, layer in soft_layers(model).items():
        model.set_submodule(name, layer.deployed().train(layer.training))
    return model


def soft_layers(model: nn.Module) -> dict[str, SoftLinear]:
    """The soft layers of a decomposed model by name; ValueError if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SoftLinear)}
    if not layers:
        raise ValueError("This model has no soft layers: call softlms.decompose(model) first.")
    return layers


def ranks(model: nn.Module) -> dict[str, int]:
    """Live components of each soft layer by name; ValueError if there are none."""
    return {name: layer.rank for name, layer in soft_layers(model).items()}


def _dense_targets(model: nn.Module, targets: Predicate | None) -> dict[str, nn.Linear]:
    """All targets by name, after a check that each is a dense layer with finite weights."""
    linears = {}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for target in find_targets(model, targets):
        name, linear = target.name, target.module
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is factored already (a {type(linear).__name__}): load the dense model again.")
        if not linear.weight.is_floating_point():
            raise ValueError(f"{name}.weight is quantized ({linear.weight.dtype}): load the model unquantized.")
        if uses[id(linear.weight)] > 1:
            raise ValueError(f"{name}.weight is shared with another layer, it cannot be factored alone: leave it out.")
        bad = [parameter for parameter, values in linear.named_parameters() if not torch.isfinite(values).all()]
        if bad:
            raise ValueError(f"{name}.{bad[0]} holds NaN or infinite values: repair the checkpoint first.")
        if not linear.weight.any():
            raise ValueError(f"{name}.weight is all zeros, it has no components: leave it out with targets=...")
        linears[name] = linear
    return linears
