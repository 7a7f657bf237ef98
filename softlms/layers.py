"""The forms of a compressed linear layer: `SoftLinear` to train, `LowRankLinear` to deploy.

Shapes: W is (m, n) as in ``nn.Linear.weight``, m outputs and n inputs; W = U diag(T(sigma)) V^T with r components.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlms.kernels.lazy import lazy_product
from softlms.modules import Replacement, as_linear, make_linear, stand_in
from softlms.thresholds import SHARPNESS, SoftThreshold, inverse_soft_threshold, soft_threshold

__all__ = [
    "LowRankLinear",
    "Ranked",
    "SoftLinear",
    "kept_parameters",
    "svd",
]


UNITS: dict[str, Callable[[Tensor], float]] = {
    "raw": lambda sigma: 1.0,
    "max": lambda sigma: sigma.max().item(),
    "mean": lambda sigma: sigma.mean().item(),
}
# default: sigma of data-aware factors fall so steeply that the largest says little about the others
UNIT = "mean"


def kept_parameters(m: int, n: int, rank: int) -> int:
    """Number of weights stored by an m x n layer of this rank: min(r (m + n), m n), without the bias.

    Examples
    --------
    >>> kept_parameters(384, 384, 96), kept_parameters(384, 384, 300)
    (73728, 147456)
    """
    return min(rank * (m + n), m * n)


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), descending sigma (r,), V (n, r) with W = U diag(sigma) V^T, r = min(m, n), in float32 or wider."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
    return U, sigma, Vh.T


class Ranked(Replacement):
    """A linear layer with m outputs and n inputs, of some rank."""

    bias: Any

    @property
    @abstractmethod
    def out_features(self) -> int:
        """m."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """n."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.out_features, self.in_features

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of live components."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The recomposed W, shape (m, n), differentiable in every factor, computed when it is used."""


class SoftLinear(Ranked):
    """Training form of a linear layer: y = x (U diag(T(sigma)) V^T)^T + bias, all factors and alpha trained.

    Components at or below alpha are not multiplied. Each forward takes the cheaper of two equivalent computations:
    through the factors, or through the recomposed W. So a step costs less as the rank falls.

    Parameters
    ----------
    U, sigma, V : Tensor
        Factors, shapes (m, r), (r,), (n, r).
    bias : Tensor, optional
        Shape (m,).
    threshold : SoftThreshold
        Contains alpha, s and their unit.
    gain : Tensor, optional
        Shape (r,), a constant for each component: W = U diag(T(sigma) gain) V^T.
    transposed : bool
        The dense layer stores its weight as (n, m), like GPT-2's Conv1D; `softlms.deploy` needs to know.

    Notes
    -----
    The columns of factors that know the data have any length: a hundredth, or thousands. An optimizer's step, which
    does not know it, would change short columns many times as much as the thin layer's. So they start as in the thin
    layer: V with columns of length 1, U with all the scale. T(sigma) gain is a gate, 1 at first (ours).

    Fig. 2 and 3 of the paper; the choice between factors and recomposed W is ours. sigma and alpha are kept in float32
    or wider for any dtype of U and V: in half precision, rounding would decide which components live.
    """

    form = "soft"
    precise = ("sigma", "gain", "threshold.alpha", "threshold.unit")
    gain: Tensor | None

    def __init__(
        self,
        U: Tensor,
        sigma: Tensor,
        V: Tensor,
        bias: Tensor | None,
        threshold: SoftThreshold,
        *,
        gain: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.U = nn.Parameter(U)
        self.sigma = nn.Parameter(sigma)
        self.V = nn.Parameter(V)
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.threshold = threshold
        self.register_buffer("gain", gain)
        self.transposed = transposed

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        factors: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        alpha: float = 0.0,
        s: float = SHARPNESS,
        unit: str = UNIT,
        transposed: bool = False,
        rank: int | None = None,
    ) -> SoftLinear:
        """Decompose `linear` so that the output does not change.

        What is frozen stays frozen: U, sigma and V learn only if the weight does, the bias only if it did. Alpha
        always learns: it chooses a rank, and a frozen layer may be cut too. A frozen layer's surviving components do
        not change (`hard` in `SoftThreshold`), and its alpha starts low enough for all of them to survive.

        Parameters
        ----------
        linear : nn.Linear
            The dense layer.
        factors : tuple of Tensor, optional
            U, sigma (descending), V with W = U diag(sigma) V^T; default: the SVD.
        alpha, s : float
            Initial threshold and sharpness, as in `SoftThreshold`.
        unit : {"raw", "max", "mean"}
            Unit of alpha (and 1 / s): raw sigma, the layer's largest sigma, or its mean.
        transposed : bool
            As above; `linear` itself is always an nn.Linear.
        rank : int, optional
            Start with this many live components instead, which do not change: alpha is halfway to the next one.
        """
        weight = linear.weight
        U, sigma, V = svd(weight) if factors is None else factors
        exact = sigma
        # a zero matrix has no scale
        scale = UNITS[unit](sigma) if sigma[0] > 0 else 1.0
        frozen = not weight.requires_grad
        live = torch.arange(len(sigma), device=sigma.device) < (len(sigma) if rank is None else rank)
        if rank is not None and rank < len(sigma):
            alpha = (sigma[rank - 1] + sigma[rank]).item() / 2 / scale
        elif frozen:
            alpha = min(alpha, sigma.min().item() / scale * (1 - 1e-3))
        if not frozen:
            sigma = torch.where(live, inverse_soft_threshold(sigma / scale, alpha, s) * scale, sigma)
        threshold = SoftThreshold(alpha, s, scale, hard=frozen).to(weight.device)
        dtype = weight.dtype
        bias = None if linear.bias is None else linear.bias.detach().clone()
        gain = None
        if factors is not None:
            smallest = torch.finfo(V.dtype).tiny
            lengths = [factor.norm(dim=0).clamp(min=smallest) for factor in (U, V)]
            # those of a plain SVD are 1 but for rounding: the paper's own form
            if any((length - 1).abs().max() > 1e-3 for length in lengths):
                U, V = U * (exact * lengths[1]), V / lengths[1]
                gain = (1 / exact.clamp(min=smallest)).to(torch.promote_types(dtype, torch.float32))
        # copy: the caller may reuse the factors, and parameters change in place
        U, V = (factor.to(dtype).clone(memory_format=torch.contiguous_format) for factor in (U, V))
        sigma = sigma.to(torch.promote_types(dtype, torch.float32))
        return stand_in(cls(U, sigma, V, bias, threshold, gain=gain, transposed=transposed), linear)

    def description(self) -> dict[str, Any]:
        return {
            "components": len(self.sigma),
            "s": self.threshold.s,
            "hard": self.threshold.hard,
            "learns": self.threshold.alpha.requires_grad,
            "transposed": self.transposed,
        } | {name: value for name, value in (("start", self.threshold.start), ("gain", self.gain is not None)) if value}

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        linear = as_linear(dense)
        m, n = linear.weight.shape
        r = description["components"]
        start, hard = description.get("start", 0.0), description.get("hard", False)  # missing in older files
        threshold = SoftThreshold(start, description["s"], hard=hard).to(linear.weight.device)
        threshold.alpha.requires_grad_(description["learns"])
        new = linear.weight.new_empty
        sigma, gain = (new(r, dtype=torch.promote_types(linear.weight.dtype, torch.float32)) for _ in range(2))
        bias = None if linear.bias is None else new(m)
        return cls(
            new(m, r),
            sigma,
            new(n, r),
            bias,
            threshold,
            gain=gain if description.get("gain", False) else None,
            transposed=description["transposed"],
        )

    def restore(self, name: str, description: Mapping[str, Any]) -> None:
        if any(values.is_meta for values in self.parameters()):
            raise ValueError(
                f"{name} is offloaded by device_map, which a soft layer cannot be: give its block a device, or save "
                "the model after softlms.deploy."
            )
        self.threshold.alpha.requires_grad_(description["learns"])  # loading creates new parameters

    @property
    def out_features(self) -> int:
        return self.U.shape[0]

    @property
    def in_features(self) -> int:
        return self.V.shape[0]

    @property
    def rank(self) -> int:
        """r = #{sigma_i > alpha} (Fig. 3)."""
        return int(self.threshold.is_live(self.sigma).sum())

    @property
    def weight(self) -> Tensor:
        left, V = self._live_factors()
        return lazy_product(left, V.T)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move sigma and the threshold between devices, but never round them, as ``model.bfloat16()`` would."""
        before = [values.data for values in self._precise()]
        super()._apply(fn, recurse)
        for now, was in zip(self._precise(), before, strict=True):
            if now.dtype.itemsize < min(4, was.dtype.itemsize):
                now.data = was.to(now.device)
        return self

    def _precise(self) -> list[Tensor]:
        gain = [] if self.gain is None else [self.gain]
        return [self.sigma, *gain, *self.threshold.parameters(), *self.threshold.buffers()]

    def _live_factors(self) -> tuple[Tensor, Tensor]:
        """U diag(T(sigma) gain) and V without the dead components: (m, rank), (n, rank)."""
        U: Tensor = self.U
        sigma: Tensor = self.sigma
        V: Tensor = self.V
        live = self.threshold.is_live(sigma).nonzero().squeeze(-1)
        if len(live) < len(sigma):
            U, sigma, V = U.index_select(1, live), sigma[live], V.index_select(1, live)
        scale = self.threshold(sigma) if self.gain is None else self.threshold(sigma) * self.gain[live]
        return U * scale.to(U.dtype), V

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        left, V = self._live_factors()
        (m, rank), n = left.shape, V.shape[0]
        tokens = x.numel() // n
        # multiplications: recomposing costs r m n once, then m n per token; the factors cost r (m + n) per token
        if m * n * (rank + tokens) < tokens * rank * (m + n):
            return F.linear(x, left @ V.T, self.bias)
        return F.linear(F.linear(x, V.T), left, self.bias)

    @torch.no_grad()
    def set_rank_(self, rank: int) -> None:
        """Move alpha so that exactly the `rank` largest sigma survive. If they already do, nothing changes.

        No threshold separates equal sigma: in that case, those to remove become exactly zero.

        Parameters
        ----------
        rank : int
            From 1 to r.

        Raises
        ------
        ValueError
            `rank` is outside this range, or larger than the number of positive sigma.
        """
        if not 1 <= rank <= len(self.sigma):
            raise ValueError(f"rank must be between 1 and {len(self.sigma)}, got {rank}.")
        if rank == self.rank:
            return
        alpha, unit = self.threshold.alpha, self.threshold.unit
        order = self.sigma.argsort(descending=True, stable=True)
        smallest_kept = self.sigma[order[rank - 1]]
        if not smallest_kept / unit > 0:
            raise ValueError(f"rank must be at most {(self.sigma > 0).sum()}, got {rank}: the other sigma are zero.")
        below = self.sigma[self.sigma < smallest_kept].clamp(min=0)
        largest_below = below.max() if len(below) else torch.zeros_like(smallest_kept)
        under = torch.nextafter((smallest_kept / unit).to(alpha.dtype), torch.zeros_like(alpha))
        alpha.copy_(torch.minimum((smallest_kept + largest_below) / 2 / unit, under))
        cut = order[rank:]
        self.sigma[cut[self.threshold.is_live(self.sigma[cut])]] = 0

    @torch.no_grad()
    def freeze_(self) -> None:
        """Fix the rank permanently: alpha stops learning, dead sigma become exactly zero, and T shrinks no others.

        As the lasso is refitted after it has selected: T takes from the components near alpha, to have a gradient
        there, and sigma learn too slowly to regain it. If nothing was learned, what is live becomes exact again (ours).
        """
        threshold, sigma = self.threshold, self.sigma
        alpha, unit = threshold.alpha.requires_grad_(False), threshold.unit
        live = threshold.is_live(sigma)
        if not threshold.hard:
            threshold.hard = True
            exact = soft_threshold(sigma / unit, threshold.start, threshold.s) * unit
            smallest = torch.finfo(sigma.dtype).tiny  # where the product underflows
            sigma.copy_(torch.where(sigma / unit > threshold.start, exact.clamp(min=smallest), sigma))
        sigma.mul_(live)
        if live.any():  # unless training has diverged
            alpha.clamp_(max=(sigma[live].min() / unit).item() * (1 - 1e-3))

    @torch.no_grad()
    def project_(self) -> None:
        """Project back into range after an optimizer step.

        While alpha learns, it stays at least 0 and below the largest sigma, so that one component always survives.
        Once alpha is frozen, live sigma stay above it instead, so that the rank set by the budget does not change.
        Frozen sigma already do.
        """
        alpha, unit = self.threshold.alpha, self.threshold.unit
        if alpha.requires_grad:
            alpha.clamp_(min=0).clamp_(max=self.sigma.max() / unit * (1 - 1e-3))
        elif self.sigma.requires_grad:
            lowest = alpha * unit * (1 + 1e-3) + torch.finfo(self.sigma.dtype).tiny
            self.sigma.copy_(torch.where(self.sigma != 0, self.sigma.clamp(min=lowest), self.sigma))

    @torch.no_grad()
    def margins(self, *, dead: bool = False) -> Tensor:
        """sigma - alpha of the live components in units of the threshold, descending, shape (rank,).

        A rising threshold would cut them in reverse order. With `dead`, also components that a lower one would revive.
        """
        margin = self.sigma / self.threshold.unit - self.threshold.alpha
        chosen = self.sigma > 0 if dead else self.threshold.is_live(self.sigma)
        return margin[chosen].sort(descending=True).values

    @torch.no_grad()
    def deployed(self, rank: int | None = None, *, dense: bool = False) -> LowRankLinear | nn.Linear:
        """The layer to deploy: T(sigma) folded in, dead components cut; dense if dense is not larger.

        Parameters
        ----------
        rank : int, optional
            Number of live components to keep, those with the largest sigma; default: all.
        dense : bool
            Always return a dense layer.
        """
        left, V = self._live_factors()
        if rank is not None and rank < V.shape[1]:
            best = self.sigma[self.threshold.is_live(self.sigma)].topk(rank).indices.sort().values
            left, V = left[:, best], V[:, best]
        (m, rank), n = left.shape, V.shape[0]
        if dense or kept_parameters(m, n, rank) == m * n:
            return stand_in(make_linear(left @ V.T, self.bias), self)
        return stand_in(LowRankLinear(V.T, left, self.bias), self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(Ranked):
    """Deployed form: y = up(down(x)), two thin matrix products.

    Parameters
    ----------
    down : Tensor
        Shape (r, n), V^T.
    up : Tensor
        Shape (m, r), U diag(T(sigma)).
    bias : Tensor, optional
        Shape (m,).
    """

    form = "low rank"

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.down = make_linear(down, None)
        self.up = make_linear(up, bias)

    @classmethod
    def from_factors(cls, U: Tensor, sigma: Tensor, V: Tensor, bias: Tensor | None, rank: int) -> LowRankLinear:
        """Build from the first `rank` components of U diag(sigma) V^T; `down` gets unit rows, `up` the scale."""
        length = V[:, :rank].norm(dim=0).clamp(min=torch.finfo(V.dtype).tiny)  # a component may be zero
        return cls((V[:, :rank] / length).T, U[:, :rank] * (sigma[:rank] * length), bias)

    def description(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        linear = as_linear(dense)
        (m, n), rank = linear.weight.shape, description["rank"]
        new = linear.weight.new_empty
        return cls(new(rank, n), new(m, rank), None if linear.bias is None else new(m))

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        down, up = self.down, self.up
        if isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
            return lazy_product(up.weight, down.weight)
        # a PEFT adapter wraps a factor: apply it to the identity to include what it adds
        one = torch.eye(self.in_features, dtype=down.weight.dtype, device=down.weight.device)
        return (up(down(one)) - up(down(torch.zeros_like(one[:1])))).T

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        return self.up(self.down(x))
