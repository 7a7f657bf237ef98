"""Three verbs that change a model in place: `decompose` and `deploy` for learned ranks, `truncate` for given ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from softlms.architectures import Predicate, Target, find_targets
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
        The model is decomposed already, its family is unknown, a weight is NaN or infinite, or alpha or s is out
        of range. Nothing has been changed then.
    """
    for target in _dense_targets(model, targets):
        soft = SoftLinear.from_linear(target.module, alpha=alpha, s=s, relative=relative)
        model.set_submodule(target.name, soft.train(target.module.training))
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
    found = _dense_targets(model, targets)
    names = {target.name for target in found}
    if names != ranks.keys():
        raise ValueError(f"ranks must name each target once; missing or unknown: {sorted(names ^ ranks.keys())}.")
    for target in found:
        if not 1 <= ranks[target.name] <= min(target.shape):
            raise ValueError(f"Rank of {target.name} must be 1 to {min(target.shape)}, got {ranks[target.name]}.")
    for target in found:
        rank, weight = ranks[target.name], target.module.weight
        if kept_parameters(*target.shape, rank) < weight.numel():
            U, sigma, V = (factor[..., :rank].to(weight.dtype) for factor in svd(weight))
            layer = LowRankLinear(V.T, U * sigma, target.module.bias)
            model.set_submodule(target.name, layer.train(target.module.training))
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


def _dense_targets(model: nn.Module, targets: Predicate | None) -> list[Target]:
    """All targets, after a check that each is a dense layer with finite weights."""
    found = find_targets(model, targets)
    for target in found:
        if not isinstance(target.module, nn.Linear):
            raise ValueError(
                f"{target.name} is factored already (a {type(target.module).__name__}): load the dense model again."
            )
        bad = [n for n, p in target.module.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise ValueError(f"{target.name}.{bad[0]} holds NaN or infinite values: repair the checkpoint first.")
        if not target.module.weight.any():
            raise ValueError(f"{target.name}.weight is all zeros, it has no components: leave it out with targets=...")
    return found
