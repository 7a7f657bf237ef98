"""The basis of a thin layer's latent space, for low-bit exports.

y = up(down(x)) does not change with an invertible r x r matrix T between the two: up T and T^-1 down. In float32 all
bases are equally good. In few bits, with one scale for many numbers, they are not: learned ranks leave columns that
differ by orders of magnitude, and the small ones together are a large part of the layer.
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
    """Return factors with the same product, each with the square roots of its singular values.

    Parameters
    ----------
    down : Tensor
        Shape (r, n).
    up : Tensor
        Shape (m, r).

    Returns
    -------
    tuple of Tensor
        The new down and up. The product W is never formed: only r (m + n) numbers are processed.
    """
    (U, left), (V, right) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    P, sigma, Qh = torch.linalg.svd(left @ right.T, full_matrices=False)
    root = sigma.sqrt()
    return root[:, None] * (V @ Qh.T).T, U @ P * root


def rotate(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product in a cosine basis, in which every component is a mixture of all.

    After `balance`, no column and no latent value of an input is then much larger than another. The cosine transform
    exists for any r and needs no seed.
    """
    R = torch.from_numpy(dct(np.eye(len(down)), norm="ortho")).to(down)
    return R @ down, up @ R.T


def change_basis_(model: nn.Module, *changes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Change the basis of every thin layer of a model, in place; the outputs do not change up to rounding.

    Parameters
    ----------
    model : nn.Module
        Thin layers whose factors are not plain linear layers (with an adapter, for example) are skipped.
    *changes : callable
        Functions such as `balance` and `rotate`, applied in the given order, in float64.
    """
    for layer in model.modules():
        if isinstance(layer, LowRankLinear) and type(layer.down) is type(layer.up) is nn.Linear:
            down, up = layer.down.weight.detach().double(), layer.up.weight.detach().double()
            for change in changes:
                down, up = change(down, up)
            for part, weight in ((layer.down, down), (layer.up, up)):
                part.weight = nn.Parameter(weight.to(part.weight.dtype), part.weight.requires_grad)
                part.out_features, part.in_features = weight.shape  # r falls if it was above m or n
