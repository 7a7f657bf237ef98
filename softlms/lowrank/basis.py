"""The basis of a thin layer's latent space, for exports in few bits.

y = up(down(x)) is the same for every invertible r x r matrix T between the two: up T and T^-1 down. In float32 one
basis is as good as another. Rounded to few bits with one scale for many numbers it is not: learned ranks leave columns
that differ by orders of magnitude, and the small ones, all together, are a good part of the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn

from softlms.layers import LowRankLinear

__all__ = ["balance", "change_basis_", "rotate"]


def balance(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product and the root of its singular values on either side.

    Parameters
    ----------
    down : Tensor
        Shape (r, n).
    up : Tensor
        Shape (m, r).

    Returns
    -------
    tuple of Tensor
        The new down and up; the product W is never made: cost is that of r (m + n) numbers.
    """
    (U, left), (V, right) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    P, sigma, Qh = torch.linalg.svd(left @ right.T, full_matrices=False)
    root = sigma.sqrt()
    return root[:, None] * (V @ Qh.T).T, U @ P * root


def rotate(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product in a basis of cosines: every component becomes a little of all.

    After `balance` no column, and no latent number of an input, is then much larger than another. The cosine transform
    is there for any r, and needs no seed.
    """
    R = torch.from_numpy(dct(np.eye(len(down)), norm="ortho")).to(down)
    return R @ down, up @ R.T


def change_basis_(model: nn.Module, *changes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Put every thin layer of a model into another basis, in place; its outputs stay the same up to rounding.

    Parameters
    ----------
    model : nn.Module
        A thin layer whose factors are not plain linear layers (an adapter sits on one, say) is left as it is.
    *changes : callable
        `balance`, `rotate`: applied in this order, in float64.
    """
    for layer in model.modules():
        if isinstance(layer, LowRankLinear) and type(layer.down) is type(layer.up) is nn.Linear:
            down, up = layer.down.weight.detach().double(), layer.up.weight.detach().double()
            for change in changes:
                down, up = change(down, up)
            for part, weight in ((layer.down, down), (layer.up, up)):
                part.weight = nn.Parameter(weight.to(part.weight.dtype), part.weight.requires_grad)
                part.out_features, part.in_features = weight.shape  # r falls where it was above m or n
