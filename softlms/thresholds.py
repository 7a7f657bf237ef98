"""Threshold functions, which decide the singular values that a layer keeps.

Glossary (the paper's symbols, arXiv 2411.10543)
    sigma   singular values of one layer, any shape
    alpha   the layer's learnable threshold
    s       sharpness of the gate
    T       the soft threshold, ``T(sigma; alpha, s)``
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = [
    "SHARPNESS",
    "SoftThreshold",
    "hard_threshold",
    "inverse_soft_threshold",
    "shifted_tanh",
    "soft_threshold",
]

SHARPNESS = 12.5  # default of s, in multiples of 1 / unit


def hard_threshold(sigma: Tensor, alpha: Tensor | float) -> Tensor:
    """H(sigma; alpha) = sigma where sigma > alpha, else 0.

    Parameters
    ----------
    sigma : Tensor
        Singular values, any shape, floating point.
    alpha : Tensor or float
        Threshold, at least 0, broadcastable to `sigma`, in the units of `sigma`.

    Returns
    -------
    Tensor
        Shape and dtype of `sigma`. The gradient is 1 for kept `sigma` and 0 elsewhere; alpha gets no gradient.

    Raises
    ------
    TypeError
        `sigma` is not floating point.
    ValueError
        `alpha` is a negative or infinite number.

    Notes
    -----
    Fig. 4a of the paper shows the function; the formula is our reading of it.
    """
    _check_sigma(sigma)
    _check_alpha(alpha)
    return torch.where(_wide(sigma) > alpha, sigma, torch.zeros_like(sigma))


def shifted_tanh(sigma: Tensor, alpha: Tensor | float, s: float) -> Tensor:
    """g(sigma; alpha, s) = tanh(s (sigma - alpha)), a differentiable gate in (-1, 1).

    Parameters
    ----------
    sigma, alpha
        As in `hard_threshold`.
    s : float
        Sharpness, positive and finite, in units of 1 / sigma.

    Returns
    -------
    Tensor
        Shape and dtype of `sigma`.

    Raises
    ------
    TypeError
        `sigma` is not floating point.
    ValueError
        `alpha` is a negative or infinite number, or `s` is not positive and finite.

    Notes
    -----
    Fig. 4b of the paper; formula from its successor STAR-KV (arXiv 2606.08382).
    """
    _check_sigma(sigma)
    _check_alpha(alpha)
    _check_s(s)
    return _gate(_wide(sigma), alpha, s).to(sigma.dtype)


def soft_threshold(sigma: Tensor, alpha: Tensor | float, s: float) -> Tensor:
    """T(sigma; alpha, s) = sigma tanh(s (sigma - alpha)) where sigma > alpha, else 0.

    Parameters
    ----------
    sigma, alpha, s
        As in `shifted_tanh`.

    Returns
    -------
    Tensor
        Shape and dtype of `sigma`, between 0 and `sigma` for non-negative `sigma`.

    Raises
    ------
    TypeError
        `sigma` is not floating point.
    ValueError
        `alpha` is a negative or infinite number, or `s` is not positive and finite.

    Notes
    -----
    With u = s (sigma - alpha), for sigma > alpha::

        dT/dsigma =  tanh u + s sigma sech^2 u
        dT/dalpha =        -  s sigma sech^2 u

    T has a kink at sigma = alpha; there it is treated as for sigma < alpha: value 0 and both gradients 0.
    So a component at or below alpha comes back only if alpha falls.
    Half precision is computed in float32. The sign of a tensor alpha is not checked (that would synchronize with the
    GPU at every step); with a negative alpha, T is still between 0 and sigma.
    Fig. 4c of the paper; formula from its successor STAR-KV.
    """
    _check_sigma(sigma)
    _check_alpha(alpha)
    _check_s(s)
    x = _wide(sigma)
    return torch.where(x > alpha, x * _gate(x, alpha, s), torch.zeros_like(x)).to(sigma.dtype)


def inverse_soft_threshold(t: Tensor, alpha: float, s: float) -> Tensor:
    """The sigma at or above alpha for which T(sigma; alpha, s) = t.

    T shrinks small singular values even at alpha = 0. Starting from the inverse makes the decomposed layer exactly
    equal to the dense one for any `s`.

    Parameters
    ----------
    t : Tensor
        Wanted values of T, at least 0, any shape.
    alpha, s
        As in `shifted_tanh`, but alpha is a number.

    Returns
    -------
    Tensor
        Shape and dtype of `t`; accurate to the rounding of that dtype.

    Raises
    ------
    TypeError
        `t` is not floating point.
    ValueError
        `alpha` is negative, or `s` is not positive and finite.

    Notes
    -----
    Ours: neither the paper nor its successor says how sigma is initialized.
    """
    _check_sigma(t)
    _check_alpha(alpha)
    _check_s(s)
    target = t.double()
    low = target.clamp(min=alpha)
    high = target + alpha + 20 / s  # tanh(20) is 1 in double precision, so T(high) >= t
    for _ in range(100):
        middle = (low + high) / 2
        below = soft_threshold(middle, alpha, s) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.to(t.dtype)


class SoftThreshold(nn.Module):
    """One layer's learnable soft threshold.

    Parameters
    ----------
    alpha : float
        Initial alpha, at least 0, in multiples of `unit`.
    s : float
        Sharpness, positive and finite, in multiples of 1 / `unit`.
    unit : float
        One unit of alpha in units of sigma: 1 for raw singular values, else the layer's largest singular value or
        their mean.
    hard : bool
        Surviving values do not change, as with `hard_threshold`, and only alpha has T's gradient. For frozen sigma,
        which cannot compensate for the shrinkage by T, and once a rank is fixed (`SoftLinear.freeze_`).

    Attributes
    ----------
    start : float
        The initial alpha, where T shrinks nothing: sigma were set for it (`inverse_soft_threshold`).

    Raises
    ------
    ValueError
        A parameter is outside the range above.
    """

    unit: Tensor

    def __init__(self, alpha: float = 0.0, s: float = SHARPNESS, unit: float = 1.0, *, hard: bool = False) -> None:
        super().__init__()
        _check_alpha(alpha)
        _check_s(s)
        if not (math.isfinite(unit) and unit > 0):
            raise ValueError(f"unit must be a positive finite number, got {unit!r}.")
        # for any torch default: in half precision, rounding would decide which components live
        self.alpha = nn.Parameter(torch.tensor(float(alpha), dtype=torch.float32))
        self.s = float(s)
        self.hard = hard
        self.start = float(alpha)
        self.register_buffer("unit", torch.tensor(float(unit), dtype=torch.float32))

    def forward(self, sigma: Tensor) -> Tensor:
        """T of `sigma` (shape (r,), units of sigma), same shape."""
        scaled = _wide(sigma) / self.unit
        t = soft_threshold(scaled.detach() if self.hard else scaled, self.alpha, self.s)
        if self.hard:
            t = hard_threshold(scaled, self.alpha) + (t - t.detach())
        return (t * self.unit).to(sigma.dtype)

    def is_live(self, sigma: Tensor) -> Tensor:
        """Surviving components, sigma > alpha, as a bool tensor with the shape of `sigma`."""
        return _wide(sigma) / self.unit > self.alpha

    def extra_repr(self) -> str:
        return f"alpha={self.alpha.item():.4g}, s={self.s:g}, unit={self.unit.item():.4g}"


def _wide(sigma: Tensor) -> Tensor:
    """Cast to at least float32: half precision has 3 digits, so sigma - alpha is noise where the gate opens."""
    return sigma.float() if sigma.dtype in (torch.float16, torch.bfloat16) else sigma


def _gate(sigma: Tensor, alpha: Tensor | float, s: float) -> Tensor:
    # an s above the dtype's range would become inf, and inf times a zero gradient is NaN
    return torch.tanh(min(s, torch.finfo(sigma.dtype).max) * (sigma - alpha))


def _check_sigma(sigma: Tensor) -> None:
    if not sigma.is_floating_point():
        raise TypeError(f"sigma must be floating point, got {sigma.dtype}; convert it with sigma.float().")


def _check_alpha(alpha: Tensor | float) -> None:
    if not isinstance(alpha, Tensor) and not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 0 and finite (singular values are not negative), got {alpha!r}.")


def _check_s(s: float) -> None:
    if not (math.isfinite(s) and s > 0):
        raise ValueError(f"s must be a positive finite number, got {s!r}.")
