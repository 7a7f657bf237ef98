"""The frozen part of LoRA-XS: singular vectors of a layer, in an order and with signs that anyone computes again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from softlms.layers import LowRankLinear

__all__ = ["COMPONENTS", "Basis", "basis_of", "same_basis"]

COMPONENTS = ("top", "random", "bottom")
NOTHING = 1e-10  # a singular value below this share of the largest is zero
UNIT = 2.0**-16  # of a fingerprint
TOLERANCE = 1e-4  # of its entries, and of 1


@dataclass(frozen=True)
class Basis:
    """Some components of a layer's W, in float64.

    Attributes
    ----------
    B : Tensor
        Shape (m, r): left singular vectors; the largest entry of each is positive.
    A : Tensor
        Shape (r, n): right singular vectors times singular values.
    """

    B: Tensor
    A: Tensor

    def fingerprint(self) -> Tensor:
        """A projection of each component, shape (r,): it changes with their order, signs and size, and with the base.

        In whole multiples of `UNIT`: whole numbers are not rounded when a model changes its precision.
        """
        m, n = len(self.B), self.A.shape[1]
        left, right = (torch.arange(size, dtype=self.B.dtype, device=self.B.device) for size in (m, n))
        return ((self.B.T @ left.cos() + self.A @ right.sin()) / UNIT).round().to(torch.int32)


def same_basis(fingerprint: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints are those of the same basis."""
    if fingerprint.shape != other.shape:
        return False
    one, two = fingerprint.double(), other.to(fingerprint.device).double()
    return bool(((one - two).abs() <= TOLERANCE * (1 / UNIT + one.abs())).all())


def basis_of(layer: Any, r: int, components: str = "top", seed: int = 0) -> Basis:
    """Components of a layer, from the SVD of its weight.

    In float64, so that another machine finds the same vectors: float32 rounds differently, and turns vectors whose
    singular values are close. The SVD of a thin layer's up @ down takes a QR of each factor and a small SVD.

    Parameters
    ----------
    layer : nn.Linear, Conv1D or LowRankLinear
    r : int
        Number of components.
    components : {"top", "random", "bottom"}
        Those with the largest singular values, drawn by `seed`, or those with the smallest.
    seed : int

    Raises
    ------
    ValueError
        The weight is not finite, or its rank is below r.
    """
    if isinstance(layer, LowRankLinear):
        (left, up), (right, down) = (
            torch.linalg.qr(f.detach().double()) for f in (layer.up.weight, layer.down.weight.T)
        )
        U, sigma, Vh = torch.linalg.svd(_finite(up @ down.T))
        U, Vh = left @ U, Vh @ right.T
    else:
        stored = layer.weight.detach()
        W = stored.T if isinstance(layer, Conv1D) else stored
        U, sigma, Vh = torch.linalg.svd(_finite(W.double()), full_matrices=False)
    rank = int((sigma > sigma[0] * NOTHING).sum())
    if r > rank:
        raise ValueError(
            f"r={r} is above its rank, {rank}: choose a smaller r, give it its own in rank_pattern, or leave it out "
            "with exclude_modules."
        )
    if components == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(rank, generator=generator)[:r].sort().values.to(sigma.device)
    else:
        every = torch.arange(rank, device=sigma.device)
        chosen = every[:r] if components == "top" else every[-r:]
    B, A = U[:, chosen], sigma[chosen, None] * Vh[chosen]
    signs = B.gather(0, B.abs().argmax(0, keepdim=True)).sign()
    return Basis(B * signs, A * signs.T)


def _finite(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise ValueError("its weight has NaN or infinite values: load the model again.")
    return weight
