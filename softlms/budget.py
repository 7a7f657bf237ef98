"""Budgets: what is counted, what a keep ratio allows, and how ranks are filled up to it exactly."""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from softlms.architectures import Predicate, find_targets
from softlms.layers import Ranked, kept_parameters
from softlms.origin import DenseModel
from softlms.utils.ranges import check_at_least_one

__all__ = [
    "Budget",
    "BudgetNotMet",
    "Costs",
    "ParameterCount",
    "count_parameters",
    "parameter_costs",
    "refill",
    "uniform_ranks",
]

PARAMETERS = ("linear", "total")
COUNTS = (*PARAMETERS, "flops", "latency")
Shapes = Mapping[str, tuple[int, int]]
Price = Callable[[int], float]


class BudgetNotMet(RuntimeError):
    """Training ended before the thresholds had cut the model to its budget."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model as deployed, and of the dense model before its first change.

    Attributes
    ----------
    linear, linear_dense : int
        Weights of the target linears, without biases: kept, and in the dense model.
    rest, rest_dense : int
        Everything else: embeddings, biases, norms, heads. A tied tensor counts once. A head or an adapter that was
        added after the first change counts in both.
    moved : int
        The part of `linear` in matrices that replaced target linears and that no rank changes.
    """

    linear: int
    linear_dense: int
    rest: int
    rest_dense: int
    moved: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.rest

    @property
    def total_dense(self) -> int:
        return self.linear_dense + self.rest_dense

    def kept(self, count: str) -> float:
        """Kept share of the dense model's parameters; `count` is "linear" or "total"."""
        if count not in PARAMETERS:
            raise ValueError(f"Parameters are counted as 'linear' or 'total', got {count!r}.")
        return (self.linear if count == "linear" else self.total) / self.dense(count)

    def dense(self, count: str) -> int:
        """Count of the dense model."""
        return self.linear_dense if count == "linear" else self.total_dense

    def fixed(self, count: str) -> int:
        """Parameters that no rank changes."""
        return self.moved + (self.rest if count == "total" else 0)


def count_parameters(model: nn.Module, targets: Predicate | None = None) -> ParameterCount:
    """Count `model` in dense, soft, masked or deployed form. Soft and masked layers count as if cut to their rank now.

    Raises
    ------
    ValueError
        The family is unknown and `targets` is not given (see `find_targets`).
    """
    found = find_targets(model, targets)
    names = {target.name for target in found}
    dense = DenseModel(model, names)
    ranked = {name: module for name, module in model.named_modules() if isinstance(module, Ranked)}
    inside = {id(p) for module in (*(t.module for t in found), *ranked.values()) for p in module.parameters()}
    others = {id(p): p.numel() for p in model.parameters() if id(p) not in inside}
    biased = [t.module for t in found] + list(ranked.values())
    others |= {id(m.bias): m.bias.numel() for m in biased if m.bias is not None}  # a mask's bias is no parameter
    moved = sum(size for key, size in others.items() if key in dense.moved)
    return ParameterCount(
        moved + sum(_kept(target.module, target.shape) for target in found),
        dense.gone + sum(m * n for m, n in (target.shape for target in found)),
        sum(others.values()) - moved + sum(_kept(m, m.shape) for name, m in ranked.items() if name not in names),
        dense.rest,
        moved,
    )


def _kept(layer: nn.Module, shape: tuple[int, int]) -> int:
    return kept_parameters(*shape, layer.rank if isinstance(layer, Ranked) else min(shape))


@dataclass(frozen=True)
class Costs:
    """What a budget counts.

    Attributes
    ----------
    count : {"linear", "total", "flops", "latency"}
    shapes : mapping
        (m, n) of each target linear by name.
    prices : mapping
        ``price(rank) -> cost`` of each layer by name. It never falls, and at full rank it is the cost of the dense
        layer. If a smaller rank costs as much, the layer is better kept dense.
    rest : float
        Cost that no rank changes, in the same unit.
    gone : float
        Further cost of the dense model, of parts that are gone, in the same unit.
    """

    count: str
    shapes: Shapes
    prices: Mapping[str, Price]
    rest: float = 0
    gone: float = 0

    def check(self, shapes: Shapes) -> None:
        """Raise ValueError unless these are the costs of layers with these names and shapes."""
        if dict(self.shapes) != dict(shapes):
            raise ValueError("The costs are of another model, or of other targets: measure this one.")

    @property
    def dense(self) -> float:
        """Cost of the whole dense model."""
        return self.rest + self.gone + sum(price(min(self.shapes[name])) for name, price in self.prices.items())

    def of(self, ranks: Mapping[str, int]) -> float:
        """Cost of the layers at these ranks, without `rest`."""
        return sum(price(ranks[name]) for name, price in self.prices.items())

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits; they differ when costs are measured again."""
        points = []
        for name, shape in self.shapes.items():
            full, price = min(shape), self.prices[name]
            points.append([price(rank) for rank in (1, full // 4, full // 2, full)] + [self.dense_from(name)])
        whole = (self.count, self.rest, points, *([self.gone] if self.gone else []))
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:12]

    def keeps_dense(self, name: str, rank: int) -> bool:
        """Whether this layer at this rank costs as much as the dense one."""
        return self.prices[name](rank) >= self.prices[name](min(self.shapes[name]))

    def dense_from(self, name: str) -> int:
        """The smallest rank at which this layer costs as much as the dense one."""
        return bisect_left(range(min(self.shapes[name])), True, key=lambda rank: self.keeps_dense(name, rank))


def parameter_costs(
    shapes: Shapes, rest: int = 0, count: str = "linear", dense_from: Mapping[str, int] | None = None
) -> Costs:
    """Stored weights as costs.

    Parameters
    ----------
    shapes : mapping
        (m, n) of each target linear by name.
    rest : int
        Parameters outside the targets (`ParameterCount.rest`); counted in "total" only.
    count : {"linear", "total"}
    dense_from : mapping, optional
        Rank of each layer from which it is stored dense although two factors would be smaller.
    """
    early = dense_from or {}
    prices = {name: partial(_weights, m, n, early.get(name, min(m, n))) for name, (m, n) in shapes.items()}
    return Costs(count, shapes, prices, rest if count == "total" else 0)


@dataclass(frozen=True)
class Budget:
    """How much of the dense model may be kept.

    Parameters
    ----------
    keep : float
        Share to keep (not to remove), above 0 and at most 1.
    count : {"linear", "total", "flops", "latency"}
        What it is a share of: the weights of the target linears; all parameters of the model; the multiplications and
        additions of its forward pass; or its measured time.
    multiple : int
        Ranks below full rank are multiples of this: 16 suits CPUs, 8 suits GPUs.

    Raises
    ------
    ValueError
        A setting is out of range.
    """

    keep: float
    count: str = "linear"
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of parameters that stays, above 0 and at most 1; got {self.keep!r}.")
        if self.count not in COUNTS:
            raise ValueError(f"count must be one of {', '.join(map(repr, COUNTS))}, got {self.count!r}.")
        check_at_least_one(multiple=self.multiple)

    def costs(self, shapes: Shapes, parameters: ParameterCount, measured: Costs | None = None) -> Costs:
        """Return the costs that this budget counts: parameters, or measured costs.

        If it counts parameters, measured costs decide which layers are better stored dense.

        Parameters
        ----------
        shapes : mapping
            (m, n) of each target linear by name.
        parameters : ParameterCount
            Of the model with these targets.
        measured : Costs, optional
            From `softlms.count_flops` or `softlms.measure_latency`.

        Raises
        ------
        ValueError
            `measured` is missing, has another count, or is of another model.
        """
        if measured is not None:
            measured.check(shapes)
        if self.count in PARAMETERS:
            dense_from = None if measured is None else {name: measured.dense_from(name) for name in shapes}
            fixed, layers = parameters.fixed(self.count), sum(m * n for m, n in shapes.values())
            gone = parameters.dense(self.count) - fixed - layers
            return replace(parameter_costs(shapes, count=self.count, dense_from=dense_from), rest=fixed, gone=gone)
        if measured is None or measured.count != self.count:
            maker = "count_flops" if self.count == "flops" else "measure_latency"
            raise ValueError(f"count={self.count!r} needs costs=softlms.{maker}(model, ...) of the dense model.")
        return measured

    def start(self, shapes: Shapes) -> dict[str, int]:
        """The smallest ranks that this budget allows."""
        return {name: min(self.multiple, *shape) for name, shape in shapes.items()}

    def limit(self, costs: Costs) -> float:
        """The cost that the target linears may have.

        Raises
        ------
        ValueError
            Even the smallest ranks do not fit; the message says why, and which `keep` would.
        """
        whole, least = costs.dense, costs.of(self.start(costs.shapes))
        limit = self.keep * whole - costs.rest
        if self.count in PARAMETERS:
            limit = int(self.keep * whole) - costs.rest
        if limit < least:
            smallest = (least + costs.rest) / whole
            if self.count in PARAMETERS:
                each = "one component per layer needs" if self.multiple == 1 else f"{self.multiple} per layer need"
                why = f"{each} {least:,} weights"
                if costs.rest:
                    why = f"embeddings, biases, norms and head alone are {costs.rest:,} parameters, and {why}"
                of, linear = f"{self.count} ({whole:,} parameters)", int(whole - costs.rest)
            else:
                why = (
                    f"everything but the target linears takes {costs.rest / whole:.0%} of it, and these at the "
                    f"smallest ranks {least / whole:.0%}"
                )
                of, linear = self.count, 0
            raise ValueError(
                f"keep={self.keep} of {of} cannot be met: {why}. "
                f"The smallest keep of {self.count} is {smallest + 5e-4:.3f}"
                + (f"; or choose count='linear' ({linear:,} weights)." if self.count == "total" else ".")
            )
        return limit


def refill(
    costs: Costs,
    ranks: Mapping[str, int],
    limit: float,
    scores: Mapping[str, Sequence[float] | Tensor],
    multiple: int = 1,
) -> dict[str, int]:
    """Add components, best score first, until not one more of any layer fits.

    Parameters
    ----------
    costs : Costs
        See `parameter_costs`.
    ranks : mapping
        Components to start from, at least 1 each; their cost must be within `limit`.
    limit : float
        What all layers together may cost.
    scores : mapping
        Score of each component that a layer has, best first; component i is added only after i - 1.
    multiple : int
        Components are added up to the next multiple of this (or to full rank), by their mean score.

    Returns
    -------
    dict
        Ranks by name. A layer whose rank costs as much as the dense one (for parameters r (m + n) >= m n) gets all
        components: more cost nothing.

    Raises
    ------
    ValueError
        The start exceeds the limit, or a rank is below 1.
    """
    result = dict(ranks)
    if min(result.values()) < 1:
        raise ValueError("Every layer keeps at least one component: a rank below 1 was given.")
    left = limit - costs.of(result)
    if left < 0:
        raise ValueError(f"The ranks given exceed the limit of {limit:,} by {-left:,}.")

    def following(name: str) -> int:
        return min((result[name] // multiple + 1) * multiple, len(scores[name]))

    def price(name: str) -> float:
        return costs.prices[name](following(name)) - costs.prices[name](result[name])

    def candidate(name: str) -> list[tuple[float, str]]:
        more = [float(score) for score in scores[name][result[name] : following(name)]]
        return [(-sum(more) / len(more), name)] if more else []

    queue = [entry for name in result for entry in candidate(name)]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        # what does not fit now never will: `left` only falls, and the layer's next price does not change
        if price(name) <= left:
            left -= price(name)
            result[name] = following(name)
            for entry in candidate(name):
                heapq.heappush(queue, entry)
    return result


def uniform_ranks(costs: Costs, limit: float, multiple: int = 1) -> dict[str, int]:
    """Ranks with the same keep ratio in each layer ("static" rank), filled up exactly to the limit.

    Parameters
    ----------
    costs : Costs
        See `parameter_costs`.
    limit : float
        Total cost that all layers together may have.
    multiple : int
        See `Budget`.

    Returns
    -------
    dict
        Ranks by name. What rounding leaves over goes to the layers that are cut most.
    """
    dense = costs.dense - costs.rest
    shares = {
        # a layer that is never called is free at any rank
        name: [-costs.prices[name](rank) / (costs.prices[name](min(shape)) or 1) for rank in range(min(shape))]
        for name, shape in costs.shapes.items()
    }
    smallest = {name: min(multiple, *shape) for name, shape in costs.shapes.items()}
    start = {name: max(_below(costs, name, limit / dense, multiple), rank) for name, rank in smallest.items()}
    return refill(costs, start if costs.of(start) <= limit else smallest, limit, shares, multiple)


def _weights(m: int, n: int, dense_from: int, rank: int) -> int:
    return m * n if rank >= dense_from else kept_parameters(m, n, rank)


def _below(costs: Costs, name: str, share: float, multiple: int) -> int:
    """The largest multiple at which a layer costs at most this share of its dense form, or 0."""
    full, price = min(costs.shapes[name]), costs.prices[name]
    low, high = 0, full // multiple
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(middle * multiple) <= share * price(full) else (low, middle - 1)
    return low * multiple
