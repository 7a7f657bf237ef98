"""Axis 2 of a low-rank method: how many components each layer keeps.

The first take components one by one, best score first, until the budget is full. The next component is of:

    uniform       the layer with the smallest kept share: the same keep ratio in each ("static")
    energy        the layer with the smallest kept share of its sum of sigma^2: one cut-off tau for all
    greedy        the layer with the largest next sigma^2 / (m + n): the most energy per weight
    sensitivity   the layer whose own cut hurts the loss most: ASVD's search (STRS), one cut-off for all

These see only the next component. The following choose all ranks at once so that the sum of the layers' errors is
least (`softlms.lowrank.cliff`): they know that a cut saves nothing between break-even and full rank. They differ in
the error:

    cliff               error of the layer's outputs, weighed by the covariance of the loss's gradients there (K-FAC)
    cliff-gradient      the same, weighed by the mean square of these gradients alone
    cliff-sensitivity   the loss measured with that layer alone cut
    cliff-energy        share of the layer's sum of sigma^2 that is cut
    cliff-greedy        the sum of sigma^2 that is cut

The learned allocations are trainers: `softlms.SoftTrainer` (soft thresholds) and `softlms.MaskTrainer` (masks).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from softlms.budget import Budget, Costs, count_parameters, refill, uniform_ranks
from softlms.layers import LowRankLinear
from softlms.lowrank.cliff import least_error_ranks, loss_increase, tail_sums
from softlms.lowrank.factorization import Factors, Statistics
from softlms.modules import replace

__all__ = ["ALLOCATIONS", "SEARCHED", "WEIGHTED", "allocate", "sensitivity_curves"]

PUBLISHED = ("uniform", "energy", "greedy", "sensitivity")
WEIGHTED = ("cliff", "cliff-gradient")  # need statistics
SEARCHED = ("sensitivity", "cliff-sensitivity")  # need curves
ALLOCATIONS = (*PUBLISHED, *WEIGHTED, "cliff-sensitivity", "cliff-energy", "cliff-greedy")
RATIOS = (0.2, 0.4, 0.6, 0.8)  # kept shares at which a layer's sensitivity is measured, besides one component

Curves = Mapping[str, Sequence[tuple[int, float]]]


def allocate(
    model: nn.Module,
    factors: Mapping[str, Factors],
    method: str,
    *,
    keep: float,
    count: str = "linear",
    curves: Curves | None = None,
    statistics: Statistics | None = None,
    multiple: int = 1,
    costs: Costs | None = None,
) -> dict[str, int]:
    """Ranks of all layers under a budget. It is filled exactly: no further component fits.

    Parameters
    ----------
    model : nn.Module
        The dense model. Parameters outside the factored layers count if `count` is "total".
    factors : mapping
        From `softlms.factorize`.
    method : str
        One of `ALLOCATIONS`, listed at the top of this module.
    keep, count, multiple
        See `softlms.Budget`.
    curves : mapping, optional
        From `sensitivity_curves`; needed by "sensitivity" and "cliff-sensitivity".
    statistics : mapping, optional
        From `softlms.calibrate` with `gradient_rows`; needed by "cliff" and "cliff-gradient".
    costs : Costs, optional
        Of the dense model, from `softlms.count_flops` or `softlms.measure_latency`. Needed if `count` is "flops" or
        "latency". If it counts parameters, layers that would not be faster count as dense.

    Returns
    -------
    dict
        Ranks by name, for `softlms.truncate`. A layer at or above break-even gets all its components and is stored
        dense.

    Raises
    ------
    ValueError
        Unknown method, `curves` or `statistics` missing, or the budget cannot be met.

    Notes
    -----
    Bisecting a cut-off, and taking components in the order in which the cut-off reaches them, yield the same ranks; the
    second meets the budget exactly. Greedy compares energies of different layers directly, in the units of the
    factorization: singular values of weights, or mean squares of outputs ("whitened", "kfac").
    """
    if method not in ALLOCATIONS:
        raise ValueError(f"Unknown allocation {method!r}; known: {', '.join(ALLOCATIONS)}.")
    shapes = {name: (f.U.shape[0], f.V.shape[0]) for name, f in factors.items()}
    budget = Budget(keep, count, multiple)
    costs = budget.costs(shapes, count_parameters(model, lambda name, module: name in shapes), costs)
    limit = budget.limit(costs)
    if method == "uniform":
        return uniform_ranks(costs, limit, multiple)
    if method in SEARCHED and (curves is None or not shapes.keys() <= curves.keys()):
        raise ValueError(f"{method!r} needs curves=softlms.sensitivity_curves(model, factors, loss), one per layer.")
    if method.startswith("cliff"):
        errors = {name: _errors(method, name, f, curves, statistics) for name, f in factors.items()}
        return least_error_ranks(costs, errors, budget.start(shapes), limit, multiple)
    scores: dict[str, Tensor] = {}
    for name, (m, n) in shapes.items():
        energy = factors[name].sigma.double().square().cpu()
        if method == "energy":
            scores[name] = -(energy.cumsum(0) - energy) / energy.sum()
        elif method == "greedy":
            scores[name] = energy / (m + n)
        elif curves is not None:
            scores[name] = _harm(curves[name], len(energy))
    return refill(costs, budget.start(shapes), limit, scores, multiple)


@torch.no_grad()
def sensitivity_curves(
    model: nn.Module, factors: Mapping[str, Factors], loss: Callable[[], float]
) -> dict[str, list[tuple[int, float]]]:
    """Measure the loss with one layer cut: to one component, and to 0.2, 0.4, 0.6 and 0.8 of its weights.

    Parameters
    ----------
    model : nn.Module
        The dense model; unchanged afterwards, even if `loss` fails.
    factors : mapping
        From `softlms.factorize`.
    loss : callable
        ``loss() -> float`` of `model` in its current state, on calibration rows; lower is better. It is called five
        times per layer, and once for the dense model.

    Returns
    -------
    dict
        Pairs (rank, loss) of each layer by rising rank; the last is the dense model.

    Raises
    ------
    ValueError
        A loss is not finite; the layer is named.
    """
    dense = loss()
    curves = {}
    for name, f in track(factors.items(), "sensitivity of each layer", transient=True, disable=not sys.stdout.isatty()):
        m, n = f.U.shape[0], f.V.shape[0]
        layer: Any = model.get_submodule(name)
        points = []
        try:
            for rank in sorted({1, *(max(1, int(ratio * m * n / (m + n))) for ratio in RATIOS)}):
                cut = LowRankLinear.from_factors(f.U, f.sigma, f.V, layer.bias, rank)
                replace(model, name, cut.to(layer.weight.dtype))
                points.append((rank, loss()))
        finally:
            model.set_submodule(name, layer)
        curves[name] = [*points, (len(f.sigma), dense)]
        if not np.isfinite([value for _, value in curves[name]]).all():
            raise ValueError(f"The loss with {name} cut is not finite: {curves[name]}.")
    return curves


def _errors(
    method: str, name: str, factors: Factors, curves: Curves | None, statistics: Statistics | None
) -> NDArray[np.float64]:
    """Error of a layer at ranks 0 to r, for an allocation that chooses all ranks at once."""
    energy = factors.sigma.double().square()
    if method == "cliff-sensitivity":
        assert curves is not None  # just checked
        return np.append(_harm(curves[name], len(energy)).numpy(), curves[name][-1][1])
    if method not in WEIGHTED:
        return tail_sums(energy / energy.sum() if method == "cliff-energy" else energy)
    known = (statistics or {}).get(name)
    if known is None or known.gradient is None:
        raise ValueError(f"{method!r} needs statistics=softlms.calibrate(model, rows, collator, gradient_rows=...).")
    return loss_increase(factors, known, kfac=method == "cliff")


def _harm(curve: Sequence[tuple[int, float]], components: int) -> Tensor:
    """Loss with the layer cut just before each component, made non-increasing in the rank: (components,)."""
    ranks, losses = np.array(curve).T
    falling = np.maximum.accumulate(losses[::-1])[::-1]
    return torch.from_numpy(np.interp(np.arange(components), ranks, falling))
