"""Which neurons form an expert: balanced k-means, or chance.

Shapes: m neurons, E experts of m / E neurons each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["SPLITS", "balanced_kmeans", "check_experts"]

ROUNDS = 20


def check_experts(neurons: int, experts: int) -> None:
    """Raise ValueError unless the experts are of equal size."""
    if experts < 1 or neurons % experts:
        fit = [number for number in range(1, neurons + 1) if neurons % number == 0]
        near = sorted(fit, key=lambda number: abs(number - experts))[:2]
        raise ValueError(f"{experts} experts do not divide {neurons} neurons: take {near[0]} or {near[-1]}.")


def balanced_kmeans(rows: Tensor, experts: int, seed: int) -> Tensor:
    """Clusters of equal size of the rows' directions.

    Parameters
    ----------
    rows : Tensor
        A neuron's weights, shape (m, d).
    experts : int
        E.
    seed : int
        Of the first centres, which are rows.

    Returns
    -------
    Tensor
        The neurons' numbers, expert by expert, shape (E, m / E).

    Notes
    -----
    Rounds of the best assignment with E seats for each centre, and new centres, until nothing changes.
    """
    check_experts(len(rows), experts)
    directions = F.normalize(rows.detach().double().cpu(), dim=1)
    seats = len(rows) // experts
    generator = torch.Generator().manual_seed(seed)
    centres = directions[torch.randperm(len(rows), generator=generator)[:experts]]
    expert_of = np.full(len(rows), -1)
    for _ in range(ROUNDS):
        cost = -(directions @ centres.T).numpy().repeat(seats, axis=1)
        _, seat = linear_sum_assignment(cost)
        if (seat // seats == expert_of).all():
            break
        expert_of = seat // seats
        members = torch.from_numpy(np.argsort(expert_of, kind="stable").reshape(experts, seats))
        centres = F.normalize(directions[members].mean(1), dim=1)
    return torch.from_numpy(np.argsort(expert_of, kind="stable").reshape(experts, seats))


def by_chance(rows: Tensor, experts: int, seed: int) -> Tensor:
    """Experts of neurons drawn by chance; see `balanced_kmeans`."""
    check_experts(len(rows), experts)
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).reshape(experts, -1).sort(1).values


SPLITS: Mapping[str, Callable[[Tensor, int, int], Tensor]] = {"kmeans": balanced_kmeans, "random": by_chance}
