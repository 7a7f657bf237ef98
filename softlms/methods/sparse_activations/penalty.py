"""Penalties that make activations zero, and an activation that turns into ReLU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PENALTIES", "Turning", "hoyer", "l1"]

SMALLEST = 1e-15


def hoyer(activations: Tensor) -> Tensor:
    """Mean over tokens of ||h||_1^2 / ||h||_2^2: how many of h's numbers count, between 1 and their number.

    Parameters
    ----------
    activations : Tensor
        Shape (..., m).

    Notes
    -----
    DSTI, arXiv 2310.04361; formula from the authors' code.
    """
    h = activations.float()
    return (h.abs().sum(-1).square() / (h.square().sum(-1) + SMALLEST)).mean()


def l1(activations: Tensor) -> Tensor:
    """Mean over tokens of ||h||_1, of activations (..., m); the authors' penalty for BERT."""
    return activations.float().abs().sum(-1).mean()


PENALTIES: Mapping[str, Callable[[Tensor], Tensor]] = {"hoyer": hoyer, "l1": l1}


class Turning(nn.Module):
    """(1 - s) old + s ReLU, where s rises from 0 to 1 in training: a smooth start (ours).

    Parameters
    ----------
    old : nn.Module
        The activation that the model was trained with.
    """

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.old, self.s = old, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.relu(x) if self.s >= 1 else torch.lerp(self.old(x), F.relu(x), self.s)
