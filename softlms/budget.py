"""Parameter budgets: what is counted, what a keep ratio allows, and the exact fit to it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from softlms.architectures import Predicate, find_targets
from softlms.layers import LowRankLinear, SoftLinear, kept_parameters

__all__ = ["Budget", "ParameterCount", "count_parameters", "refill", "uniform_ranks"]

COUNTS = ("linear", "total")
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, as deployed.

    Attributes
    ----------
    linear, linear_dense : int
        Weights of the target linears: kept, and in the dense model. Biases are not among them.
    rest : int
        Everything else: embeddings, biases, norms, heads; a tied tensor counts once.
    """

    linear: int
    linear_dense: int
    rest: int

    @property
    def total(self) -> int:
        return self.linear + self.rest

    @property
    def total_dense(self) -> int:
        return self.linear_dense + self.rest

    def kept(self, count: str) -> float:
        """Kept share of the dense model's parameters, `count` "linear" or "total"."""
        _check_count(count)
        return self.linear / self.linear_dense if count == "linear" else self.total / self.total_dense


def count_parameters(model: nn.Module, targets: Predicate | None = None) -> ParameterCount:
    """Count `model` in its dense, soft or deployed form; a soft layer counts as it would be deployed.

    Raises
    ------
    ValueError
        The family is unknown and `targets` is not given (see `find_targets`).
    """
    found = find_targets(model, targets)
    soft = [t.module for t in found if isinstance(t.module, (SoftLinear, LowRankLinear))]
    inside = {id(p) for t in found for n, p in t.module.named_parameters() if not n.endswith("bias")}
    linear_dense = sum(m * n for m, n in (t.shape for t in found))
    linear = sum(kept_parameters(layer.out_features, layer.in_features, layer.rank) for layer in soft)
    linear += sum(m * n for m, n in (t.shape for t in found if t.module not in soft))
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return ParameterCount(linear, linear_dense, rest)


@dataclass(frozen=True)
class Budget:
    """How much of the dense model may be kept.

    Parameters
    ----------
    keep : float
        Share that is kept (not removed), above 0 and at most 1.
    count : {"linear", "total"}
        Share of what: the weights of the target linears, or all parameters of the model.

    Raises
    ------
    ValueError
        `keep` or `count` is out of range.
    """

    keep: float
    count: str

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of parameters that stays, above 0 and at most 1; got {self.keep!r}.")
        _check_count(self.count)

    def limit(self, shapes: Shapes, rest: int) -> int:
        """Weights that the target linears may store.

        Parameters
        ----------
        shapes : mapping
            (m, n) of each target by name.
        rest : int
            Parameters outside of them (`ParameterCount.rest`).

        Raises
        ------
        ValueError
            Not even one component a layer would fit; says why and what would.
        """
        linear = sum(m * n for m, n in shapes.values())
        least = sum(kept_parameters(m, n, 1) for m, n in shapes.values())
        whole, outside = (linear, 0) if self.count == "linear" else (linear + rest, rest)
        limit = int(self.keep * whole) - outside
        if limit < least:
            smallest = (least + outside) / whole
            why = f"one component a layer needs {least:,} weights"
            if outside:
                why = f"embeddings, biases, norms and head alone are {outside:,} parameters, and {why}"
            raise ValueError(
                f"keep={self.keep} of {self.count} ({whole:,} parameters) cannot be met: {why}. "
                f"The smallest keep of {self.count} is {smallest + 5e-4:.3f}"
                + (f"; or choose count='linear' ({linear:,} weights)." if self.count == "total" else ".")
            )
        return limit


def refill(
    shapes: Shapes, ranks: Mapping[str, int], limit: int, scores: Mapping[str, Sequence[float] | Tensor]
) -> dict[str, int]:
    """Add components, best score first, until not one more of any layer fits.

    Parameters
    ----------
    shapes : mapping
        (m, n) of each layer by name.
    ranks : mapping
        Components to start from, at least 1 each; their cost must be within `limit`.
    limit : int
        Weights that all layers together may store.
    scores : mapping
        Score of each component that a layer has, best first; component i is added only after i - 1.

    Returns
    -------
    dict
        Ranks by name. A layer at or above break-even, r (m + n) >= m n, is stored dense and so gets all components.

    Raises
    ------
    ValueError
        The start exceeds the limit, or a rank is below 1.
    """
    result = dict(ranks)
    if min(result.values()) < 1:
        raise ValueError("Every layer keeps at least one component: a rank below 1 was given.")
    left = limit - sum(kept_parameters(*shapes[name], rank) for name, rank in result.items())
    if left < 0:
        raise ValueError(f"The ranks given exceed the limit of {limit:,} weights by {-left:,}.")

    def price(name: str) -> int:
        rank = result[name]
        return kept_parameters(*shapes[name], rank + 1) - kept_parameters(*shapes[name], rank)

    def candidate(name: str) -> list[tuple[float, str]]:
        return [(-float(scores[name][result[name]]), name)] if result[name] < len(scores[name]) else []

    queue = [entry for name in result for entry in candidate(name)]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        # what does not fit now never will: `left` only falls, and this layer's next price stays
        if price(name) <= left:
            left -= price(name)
            result[name] += 1
            for entry in candidate(name):
                heapq.heappush(queue, entry)
    return result


def uniform_ranks(shapes: Shapes, limit: int) -> dict[str, int]:
    """The same keep ratio in each layer ("static" rank), filled up exactly to the limit.

    Parameters
    ----------
    shapes : mapping
        (m, n) of each layer by name.
    limit : int
        Weights that all layers together may store.

    Returns
    -------
    dict
        Ranks by name; what rounding leaves over goes to the layers that are cut deepest.
    """
    keep = limit / sum(m * n for m, n in shapes.values())
    start = {name: max(1, int(keep * m * n / (m + n))) for name, (m, n) in shapes.items()}
    scores = {name: [-rank * (m + n) / (m * n) for rank in range(min(m, n))] for name, (m, n) in shapes.items()}
    if sum(kept_parameters(*shapes[name], rank) for name, rank in start.items()) > limit:
        start = dict.fromkeys(shapes, 1)
    return refill(shapes, start, limit, scores)


def _check_count(count: str) -> None:
    if count not in COUNTS:
        raise ValueError(f"count must be one of {', '.join(map(repr, COUNTS))}, got {count!r}.")
