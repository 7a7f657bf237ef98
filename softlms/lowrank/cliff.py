"""Ranks of all layers at once: the least total error at a cost, knowing where a cut saves nothing.

Between break-even, r (m + n) = m n, and full rank a layer costs as much as the dense one: its cost has a cliff there.
Taking components one by one cannot see it: each of them looks as dear as the next. Here every layer chooses among all
its ranks, and most of the budget goes to layers that stay whole.

The problem is a multiple-choice knapsack. Its Lagrangian, sum of errors + lambda x sum of costs, is least at points on
each layer's lower convex hull of (cost, error); `least_error_ranks` walks along these hulls (Ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softlms.budget import Costs
from softlms.lowrank.calibration import LayerStatistics
from softlms.lowrank.factorization import Factors

__all__ = ["least_error_ranks", "loss_increase", "tail_sums"]

Curve = NDArray[np.float64]


def tail_sums(energy: Tensor) -> Curve:
    """Error of a layer cut to each rank, if errors of components add up: shape (r + 1,) from energies of shape (r,)."""
    sums = energy.double().cpu().flip(0).cumsum(0).flip(0)
    return np.append(sums.numpy(), 0.0)


def loss_increase(factors: Factors, statistics: LayerStatistics, *, kfac: bool = False) -> Curve:
    """How much the loss grows, to second order, if a layer is cut to each rank: shape (r + 1,), up to a factor.

    With D the error of the weight at rank r, x the layer's input and g the gradient of the loss in its output::

        mean(g^2) mean(|D x|^2)                            by default
        tr(G D X D^T),  G = mean(g g^T), X = mean(x x^T)   with kfac (Kronecker-factored curvature, arXiv 1503.05671)

    Parameters
    ----------
    factors : Factors
        Any factorization; its error is measured, not taken from sigma.
    statistics : LayerStatistics
        With `gradient`.
    kfac : bool
        Weigh the directions of the output by their own gradients, not all alike.
    """
    assert statistics.gradient is not None  # checked by allocate
    U, sigma, V = factors.U.double(), factors.sigma.double(), factors.V.double()
    gram = statistics.gram.to(V.device, V.dtype)
    gradient = statistics.gradient.to(U.device, U.dtype)
    right = V * sigma
    left = U.T @ gradient @ U if kfac else U.T @ U * gradient.diagonal().mean()
    pairs = left * (right.T @ gram @ right)
    # the sum over all pairs of components from r on, for each r
    ends = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return np.append(ends.clamp(min=0).cpu().numpy(), 0.0)


def least_error_ranks(
    costs: Costs, errors: Mapping[str, Curve], start: Mapping[str, int], limit: float, multiple: int = 1
) -> dict[str, int]:
    """Ranks with the least total error at a cost, filled up until not one more component fits.

    Parameters
    ----------
    costs : Costs
    errors : mapping
        Error of each layer at ranks 0 to r, shape (r + 1,), in one unit for all. Made non-increasing.
    start : mapping
        The smallest ranks; their cost must be within `limit`.
    limit : float
        What all layers together may cost.
    multiple : int
        Ranks below full rank are multiples of this.

    Notes
    -----
    The hulls' steps, taken in order of error per cost, give the optimum for each cost at which one of them ends. What
    the last one leaves over is filled with the best steps that fit, on the hull or not.
    """
    layers = {
        name: _Choices(costs, name, np.minimum.accumulate(errors[name]), least, multiple)
        for name, least in start.items()
    }
    left = limit - costs.of(start)
    steps = sorted((-gain, name, to) for name, layer in layers.items() for gain, to in layer.hull())
    for _, name, to in steps:
        price = layers[name].price(to)
        if price > left:
            break
        left -= price
        layers[name].at = to
    while best := max(((*layer.best(left), name) for name, layer in layers.items()), default=None):
        _, to, name = best
        if to < 0:
            break
        left -= layers[name].price(to)
        layers[name].at = to
    return {name: int(layer.ranks[layer.at]) for name, layer in layers.items()}


class _Choices:
    """A layer's ranks, with cost and error of each, and the chosen one."""

    def __init__(self, costs: Costs, name: str, errors: Curve, least: int, multiple: int) -> None:
        full = len(errors) - 1
        self.ranks = np.unique([*range(least, full, multiple), full])
        self.costs = np.array([costs.prices[name](int(rank)) for rank in self.ranks], dtype=float)
        self.errors = errors[self.ranks]
        self.at = 0

    def price(self, to: int) -> float:
        return float(self.costs[to] - self.costs[self.at])

    def hull(self) -> list[tuple[float, int]]:
        """Steps along the lower convex hull from the start: (error saved per cost, index)."""
        corners = [0]
        for i in range(1, len(self.ranks)):
            while len(corners) > 1 and self._slope(corners[-2], i) >= self._slope(corners[-2], corners[-1]):
                corners.pop()
            corners.append(i)
        return [(self._slope(a, b), b) for a, b in pairwise(corners)]

    def _slope(self, a: int, b: int) -> float:
        saved, price = self.errors[a] - self.errors[b], self.costs[b] - self.costs[a]
        return float(saved / price) if price > 0 else np.inf

    def best(self, left: float) -> tuple[float, int]:
        """The step up that saves most error per cost and costs at most `left`; index -1 if none fits."""
        price = self.costs[self.at + 1 :] - self.costs[self.at]
        fits = price <= left
        if not fits.any():
            return -np.inf, -1
        saved = self.errors[self.at] - self.errors[self.at + 1 :]
        gain = np.where(fits, np.where(price > 0, saved / np.where(price > 0, price, 1), np.inf), -np.inf)
        best = len(gain) - 1 - int(gain[::-1].argmax())  # of equal ones the largest: more costs nothing
        return float(gain[best]), self.at + 1 + best
