"""Functions that change a model in place: `decompose` and `deploy` for learned ranks, `truncate` for given ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from softlms.architectures import Predicate, find_targets
from softlms.budget import Budget, Costs, count_parameters, parameter_costs, refill
from softlms.layers import UNIT, UNITS, LowRankLinear, Ranked, SoftLinear, kept_parameters
from softlms.lowrank.factorization import Factors, Statistics, check_method, factorize_weight, linear_targets
from softlms.modules import as_conv1d, as_linear, replace
from softlms.origin import left_whole, remember
from softlms.sharding import check_gathered
from softlms.thresholds import SHARPNESS, SoftThreshold

__all__ = ["budget_shapes", "decompose", "deploy", "ranks", "shrink", "soft_layers", "truncate"]

M = TypeVar("M", bound=nn.Module)


def decompose(
    model: M,
    factors: str | Mapping[str, Factors] = "svd",
    statistics: Statistics | None = None,
    *,
    alpha: float = 0.0,
    s: float = SHARPNESS,
    unit: str = UNIT,
    targets: Predicate | None = None,
    ranks: Mapping[str, int] | None = None,
) -> M:
    """Replace every target linear by its factors with a learnable threshold; the outputs do not change.

    Each layer keeps its mode and its forward and backward hooks, and what is frozen stays frozen: if a weight does not
    learn, neither do U, sigma and V. Its threshold still learns, as it chooses a rank, and cuts without shrinking the
    surviving components. To keep a layer from being cut, leave it out with `targets`.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    factors : {"svd", "fwsvd", "asvd", "whitened", "kfac"} or mapping
        How the factors are computed, or the factors of this model from `softlms.factorize`.
    statistics : mapping, optional
        From `softlms.calibrate`; needed by all but "svd".
    alpha, s, unit
        Initial threshold, sharpness, and the unit of both ("raw", "max" or "mean" sigma of the layer); see
        `SoftLinear.from_linear`.
    targets : callable, optional
        Selects the layers; see `find_targets`.
    ranks : mapping, optional
        Where each threshold starts instead, as from `softlms.allocate`: the outputs become those of the factors cut to
        these ranks. A layer at full rank stays dense; it is not learned, and counts in the budget.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        The model is decomposed already, its family is unknown, a weight is NaN, infinite, all zeros, shared,
        quantized, offloaded or parametrized, a layer has an adapter or a custom forward, factors or statistics do not
        fit, alpha, s or unit is out of range, or ranks do not fit or leave all layers whole. In that case nothing is
        changed.
    """
    linears = linear_targets(model, targets)
    make = _maker(linears, factors, statistics)
    SoftThreshold(alpha, s)  # rejects values out of range
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}.")
    whole: list[str] = []
    if ranks is not None:
        _check_ranks(linears, ranks)
        whole = [name for name, linear in linears.items() if ranks[name] == min(linear.weight.shape)]
        if len(whole) == len(linears):
            raise ValueError("These ranks leave every layer whole, with no threshold to learn: lower keep.")
    remember(model, linears, whole)
    for name, linear in linears.items():
        if name in whole:
            continue
        f = make(name)
        transposed = isinstance(model.get_submodule(name), Conv1D)
        soft = SoftLinear.from_linear(
            linear,
            (f.U, f.sigma, f.V),
            alpha=alpha,
            s=s,
            unit=unit,
            transposed=transposed,
            rank=None if ranks is None else ranks[name],
        )
        replace(model, name, soft)
    return model


def truncate(
    model: M,
    ranks: Mapping[str, int],
    factors: str | Mapping[str, Factors] = "svd",
    statistics: Statistics | None = None,
    *,
    targets: Predicate | None = None,
    costs: Costs | None = None,
) -> M:
    """Replace every target linear by the leading components of its factors: the static baselines.

    Each layer keeps its mode and its forward and backward hooks, and what is frozen stays frozen.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    ranks : mapping
        Number of components to keep of each target by name, as from `softlms.allocate`. A layer that would not get
        smaller stays dense.
    factors, statistics, targets
        As in `decompose`.
    costs : Costs, optional
        From `softlms.measure_latency`: layers that would not be faster stay dense.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        As in `decompose`; `ranks` misses a layer or names one that is not a target; a rank is not a whole number or is
        out of range; or `costs` are of another model. In that case nothing is changed.
    """
    if isinstance(ranks, str) or any(isinstance(rank, Factors) for rank in ranks.values()):
        raise ValueError("Ranks come before factors: softlms.truncate(model, ranks, factors).")
    linears = linear_targets(model, targets)
    _check_ranks(linears, ranks)
    make = _maker(linears, factors, statistics)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    prices = costs or parameter_costs(shapes)
    prices.check(shapes)
    remember(model, linears)
    for name, linear in linears.items():
        if not prices.keeps_dense(name, ranks[name]):
            f = make(name)
            layer = LowRankLinear.from_factors(f.U, f.sigma, f.V, linear.bias, ranks[name]).to(linear.weight.dtype)
            replace(model, name, layer)
    return model


def shrink(model: M, ranks: Mapping[str, int], *, targets: Predicate | None = None) -> M:
    """Give every target linear the deployed shape of its rank, with arbitrary values.

    For work that depends only on shapes: timing and counting.

    Parameters
    ----------
    model, ranks, targets
        As in `truncate`; the model is dense, and its weights are not read.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        As in `truncate` for `ranks`. In that case nothing is changed.
    """
    linears: dict[str, Any] = {target.name: as_linear(target.module) for target in find_targets(model, targets)}
    _check_ranks(linears, ranks)
    remember(model, linears)
    for name, linear in linears.items():
        m, n, rank = linear.out_features, linear.in_features, ranks[name]
        if kept_parameters(m, n, rank) < m * n:
            weight = linear.weight.detach()
            layer = LowRankLinear(weight.new_zeros(rank, n), weight.new_zeros(m, rank), linear.bias)
            replace(model, name, layer)
    return model


def deploy(
    model: M, keep: float | None = None, count: str | None = None, *, multiple: int = 1, costs: Costs | None = None
) -> M:
    """Cut every soft layer to its live components and fold T(sigma) in: thin, or dense if dense is not larger.

    Parameters
    ----------
    model : nn.Module
        A decomposed model, changed in place.
    keep, count
        Cut further, exactly to this budget (see `softlms.Budget`), without training: components with the smallest
        sigma - alpha go first, as if all thresholds rose together. So one trained model yields any smaller size;
        train it again if quality matters.
    multiple : int
        For ranks that are cut to a budget; see `softlms.Budget`.
    costs : Costs, optional
        Of the dense model, from `softlms.measure_latency`: layers that would not be faster stay dense. Needed if
        `count` is "flops" or "latency".

    Returns
    -------
    nn.Module
        `model` itself. Without `keep` its outputs equal those of the soft form.

    Raises
    ------
    ValueError
        The model was never decomposed or is deployed already, `count` or `multiple` is given without `keep`, the budget
        cannot be met or is not below what the model already keeps, or `costs` are of another model. In that case
        nothing is changed.
    """
    layers = soft_layers(model)
    check_gathered(model, "trainer.save_model(folder), then load and deploy it in one process")
    shapes = budget_shapes(model)
    kept = {name: layers[name].rank if name in layers else min(shape) for name, shape in shapes.items()}
    if costs is not None:
        costs.check(shapes)
    if keep is None and (count is not None or multiple != 1):
        raise ValueError("count and multiple describe a budget: pass keep too, as in deploy(model, keep=0.4).")
    if keep is not None:
        parameters = count_parameters(model, lambda name, module: name in shapes)
        budget = Budget(keep, count or "linear", multiple)
        costs = budget.costs(shapes, parameters, costs)
        limit = budget.limit(costs)
        if limit > costs.of(kept):
            share = (costs.of(kept) + costs.rest) / costs.dense
            raise ValueError(
                f"keep={keep} of {budget.count} is more than this model keeps ({share:.3f}): it can only be cut."
            )
        margins = {name: layers[name].margins().tolist() if name in layers else [] for name in shapes}
        for name, rank in kept.items():
            if multiple < rank < min(shapes[name]):
                del margins[name][rank // multiple * multiple :]
        least = {name: min(multiple, rank) if name in layers else rank for name, rank in kept.items()}
        kept = refill(costs, least, limit, margins, multiple)
    for name, layer in layers.items():
        dense = costs is not None and costs.keeps_dense(name, kept[name])
        deployed = layer.deployed(kept[name], dense=dense)
        if layer.transposed and isinstance(deployed, nn.Linear):
            deployed = as_conv1d(deployed)
        replace(model, name, deployed)
    return model


def soft_layers(model: nn.Module) -> dict[str, SoftLinear]:
    """The soft layers of a decomposed model by name; ValueError if there are none."""
    factored = _factored(model)
    layers = {name: layer for name, layer in factored.items() if isinstance(layer, SoftLinear)}
    if not layers and any(isinstance(layer, LowRankLinear) for layer in factored.values()):
        raise ValueError(
            "This model is deployed already: it cannot be cut further, and transformers' Trainer can train it."
        )
    if not layers:
        raise ValueError("This model has no soft layers: call softlms.decompose(model) first.")
    return layers


def budget_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(m, n) of the layers that a soft model's budget counts: the soft ones, and those left whole."""
    names = {*soft_layers(model), *left_whole(model)}
    return {target.name: target.shape for target in find_targets(model, lambda name, module: name in names)}


def ranks(model: nn.Module) -> dict[str, int]:
    """Ranks of the factored layers by name: live components of a soft or masked layer, all of a deployed one.

    Layers that are stored dense are not included.

    Raises
    ------
    ValueError
        There are no factored layers.
    """
    factored = _factored(model)
    if not factored:
        raise ValueError("This model has no factored layers: call softlms.decompose(model) first.")
    return {name: layer.rank for name, layer in factored.items()}


def _factored(model: nn.Module) -> dict[str, Ranked]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Ranked)}


def _maker(
    linears: Mapping[str, nn.Linear], factors: str | Mapping[str, Factors], statistics: Statistics | None
) -> Callable[[str], Factors]:
    """Return a function from a layer's name to its factors, computed on request: one layer in memory at a time."""
    if isinstance(factors, str):
        check_method(factors, linears, statistics)
        return lambda name: factorize_weight(linears[name].weight, factors, statistics[name] if statistics else None)
    for name, linear in linears.items():
        f = factors.get(name)
        if not isinstance(f, Factors) or (len(f.U), len(f.V)) != linear.weight.shape:
            raise ValueError(f"factors lack {name}, or have another shape: factorize the same model and targets.")
    return factors.__getitem__


def _check_ranks(layers: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    if layers.keys() != ranks.keys():
        raise ValueError(
            f"ranks must name each target once; missing or unknown: {sorted(layers.keys() ^ ranks.keys())}."
        )
    for name, layer in layers.items():
        full = min(layer.out_features, layer.in_features)
        if not isinstance(ranks[name], Integral):
            raise ValueError(f"Rank of {name} must be a whole number, got {ranks[name]!r}.")
        if not 1 <= ranks[name] <= full:
            raise ValueError(f"Rank of {name} must be 1 to {full}, got {ranks[name]}.")
