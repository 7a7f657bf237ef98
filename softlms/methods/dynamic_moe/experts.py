"""`Experts`: a feed-forward in parts, of which a token runs those that matter to it.

Shapes: N tokens of d numbers, E experts of k neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from softlms.modules import Replacement

__all__ = ["Experts", "Passed", "Router"]


class Router(nn.Module):
    """R, the size of W_2 relu(W_1 x): how much each expert's output matters, shape (..., E), of states (..., d).

    Parameters
    ----------
    size, experts, hidden : int
        d, E and the width between.
    signed : bool
        Without the absolute value: a logit, as MoEfication has it.
    """

    def __init__(self, size: int, experts: int, hidden: int, *, signed: bool = False) -> None:
        super().__init__()
        self.signed = signed
        self.enter = nn.Linear(size, hidden, bias=False)
        self.leave = nn.Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., E)."""
        R = self.leave(self.enter(x).relu())
        return R if self.signed else R.abs()


class Experts(Replacement):
    """y = sum_e V_e act(U_e x + b_e) + c over the experts that run; gated: act(G_e x + g_e) * (U_e x + b_e).

    Expert e runs for a token where R_e >= (1 - tau) max_j R_j; with `top` the experts with the largest R run, as many
    for every token. With tau = 1 all run.

    Parameters
    ----------
    size : int
        d.
    experts, neurons : int
        E and k.
    inner : tuple of (int or None)
        Ranks of low-rank linears: the thin product before the experts, which they share, and the one behind them.
    hidden : int
    signed : bool
        See `Router`.
    trained : bool
        Whether the router knows anything yet.
    gated, entering_bias, leaving_bias : bool
    activation : str
        Its name in transformers.
    dropout : float
        Behind the experts, where the replaced module has it.
    grouped_below : float
        Share of the experts below which the tokens of each are gathered; above, all are computed and those that do not
        run are masked. Both give the same; see `softlms.methods.dynamic_moe.counts.measure_crossover`.
    tau : float
    top : int, optional

    Attributes
    ----------
    ran, tokens : int
        Experts that ran, and tokens with padding, since `start_counting`.

    Notes
    -----
    Dynamic-k of DSTI, arXiv 2310.04361; formulas from the authors' code. Thin products around experts are ours.
    """

    form = "experts"

    def __init__(
        self,
        size: int,
        experts: int,
        neurons: int,
        *,
        inner: tuple[int | None, int | None] = (None, None),
        hidden: int = 128,
        signed: bool = False,
        trained: bool = False,
        gated: bool = False,
        entering_bias: bool = True,
        leaving_bias: bool = True,
        activation: str = "relu",
        dropout: float = 0.0,
        grouped_below: float = 0.5,
        tau: float = 1.0,
        top: int | None = None,
    ) -> None:
        super().__init__()
        before, behind = inner
        into, out = before or size, behind or size
        self.size, self.inner, self.activation_name, self.gated = size, (before, behind), activation, gated
        self.tau, self.top, self.grouped_below, self.trained = tau, top, grouped_below, trained
        self.router = Router(size, experts, hidden, signed=signed)
        self.before = None if before is None else nn.Linear(size, before, bias=False)
        self.behind = None if behind is None else nn.Linear(behind, size, bias=False)
        self.U = nn.Parameter(torch.empty(experts, neurons, into))
        self.G = nn.Parameter(torch.empty(experts, neurons, into)) if gated else None
        self.V = nn.Parameter(torch.empty(experts, neurons, out))
        self.b = nn.Parameter(torch.empty(experts, neurons)) if entering_bias else None
        self.g = nn.Parameter(torch.empty(experts, neurons)) if gated and entering_bias else None
        self.c = nn.Parameter(torch.empty(size)) if leaving_bias else None
        self.act = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.start_counting()

    def description(self) -> dict[str, Any]:
        return {
            "experts": len(self.U),
            "neurons": self.U.shape[1],
            "size": self.size,
            "inner": list(self.inner),
            "hidden": self.router.enter.out_features,
            "grouped_below": self.grouped_below,
            "signed": self.router.signed,
            "trained": self.trained,
            "gated": self.gated,
            "entering_bias": self.b is not None,
            "leaving_bias": self.c is not None,
            "activation": self.activation_name,
            "dropout": self.dropout.p,
            "tau": self.tau,
            "top": self.top,
        }

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        options = {name: value for name, value in description.items() if name not in ("form", "added")}
        made = cls(**options | {"inner": tuple(options["inner"])})
        first = next(dense.parameters())
        return made.to(first.device, first.dtype)

    def start_counting(self) -> None:
        """Forget what ran."""
        self.ran = self.tokens = 0

    def share(self) -> float:
        """Share of the experts that ran, mean over tokens; 1 before any."""
        return self.ran / (self.tokens * len(self.U)) if self.tokens else 1.0

    def flops(self) -> tuple[float, float]:
        """FLOPs of a token, mean since `start_counting`: as it ran, router included; and of a dense feed-forward."""
        divided = sum(values.numel() for values in (self.U, self.G, self.V) if values is not None)
        shared = sum(layer.weight.numel() for layer in (self.before, self.behind) if layer is not None)
        routes = self.top is not None or self.tau < 1
        router = sum(values.numel() for values in self.router.parameters()) if routes else 0
        dense = (2 if self.G is None else 3) * self.size * self.U.shape[0] * self.U.shape[1]
        return 2 * (self.share() * divided + shared + router), 2.0 * dense

    def chosen(self, x: Tensor) -> Tensor | None:
        """Which experts run, shape (N, E), of states (N, d); None if all do."""
        if self.top is not None:
            R = self.router(x)
            return torch.zeros_like(R, dtype=torch.bool).scatter(1, R.topk(self.top, dim=1).indices, True)
        if self.tau >= 1:
            return None
        R = self.router(x)
        return (1 - self.tau) * R.amax(1, keepdim=True) <= R

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        x = hidden_states.reshape(-1, self.size)
        runs = self.chosen(x)
        self.tokens += len(x)
        self.ran += len(x) * len(self.U) if runs is None else int(runs.sum())
        inside = x if self.before is None else self.before(x)
        if runs is not None and not torch.is_grad_enabled() and runs.float().mean() < self.grouped_below:
            y = self._gathered(inside, runs)
        else:
            y = self._masked(inside, runs)
        y = y if self.behind is None else self.behind(y)
        y = y if self.c is None else y + self.c
        return self.dropout(y).reshape(hidden_states.shape)

    def outputs(self, x: Tensor) -> Tensor:
        """The norm of each expert's output, shape (N, E), of states (N, d)."""
        inside = x if self.before is None else self.before(x)
        h = self._neurons(inside).reshape(len(x), *self.U.shape[:2])
        V = self.V if self.behind is None else self.V @ self.behind.weight.T
        gram = V @ V.transpose(1, 2)  # |V^T h|^2 = h^T V V^T h, without outputs of N E d numbers
        return torch.einsum("nek,ekl,nel->ne", h, gram, h).clamp(min=0).sqrt()

    def _neurons(self, inside: Tensor) -> Tensor:
        """All activations, shape (N, E k)."""
        linear = torch.nn.functional.linear
        h = linear(inside, self.U.flatten(0, 1), None if self.b is None else self.b.flatten())
        if self.G is None:
            return self.act(h)
        return h * self.act(linear(inside, self.G.flatten(0, 1), None if self.g is None else self.g.flatten()))

    def _masked(self, inside: Tensor, runs: Tensor | None) -> Tensor:
        h = self._neurons(inside)
        if runs is not None:
            h = (h.reshape(len(h), *self.U.shape[:2]) * runs[..., None]).flatten(1)
        return h @ self.V.flatten(0, 1)

    def _gathered(self, inside: Tensor, runs: Tensor) -> Tensor:
        """Expert by expert: gather its tokens, two thin products, add to their outputs."""
        y = torch.zeros(len(inside), self.V.shape[-1], dtype=self.V.dtype, device=inside.device)
        experts, tokens = runs.T.nonzero(as_tuple=True)
        parts = tokens.split(torch.bincount(experts, minlength=len(self.U)).tolist())
        for e, rows in enumerate(parts):
            if not len(rows):
                continue
            own = inside[rows].to(self.U.dtype)
            h = own @ self.U[e].T if self.b is None else torch.addmm(self.b[e], own, self.U[e].T)
            if self.G is None:
                h = self.act(h)
            else:
                h = h * self.act(own @ self.G[e].T if self.g is None else torch.addmm(self.g[e], own, self.G[e].T))
            y.index_add_(0, rows, (h @ self.V[e]).to(y.dtype))
        return y


class Passed(Replacement):
    """What stands where a linear was whose work is done elsewhere: it returns what it gets."""

    form = "passed"

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        """Unchanged."""
        return x
