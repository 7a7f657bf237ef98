"""The loss that weighs the heads of all blocks, and so learns how many blocks are needed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["depth_loss", "weigh"]


def weigh(w: Tensor, logs: Tensor) -> Tensor:
    """z = sum_i a_i log p_i with a = softmax(w): (B, C) of log-probabilities (B, L, C) and w (L,)."""
    return (w.softmax(0)[:, None] * logs).sum(1)


def depth_loss(w: Tensor, logits: Tensor, target: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    """Mean over rows of -sum_c t_c z_c + gamma log sum_c e^{z_c}, and beta sum_i a_i i.

    Without the normaliser (gamma = 0) a mixture is never better for a row than its best head, so that the weights
    settle on one; with it (gamma = 1) they spread over an ensemble.

    Parameters
    ----------
    w : Tensor
        Shape (L,).
    logits : Tensor
        Of the heads, shape (B, L, C).
    target : Tensor
        Probabilities t, shape (B, C).
    beta : float
        Price of a block.
    gamma : float
        Share of the normaliser.

    Notes
    -----
    Optimal network depth, arXiv 2004.08172; formula from the authors' code.
    """
    z = weigh(w, logits.log_softmax(-1))
    blocks = torch.arange(1, len(w) + 1, device=w.device)
    row = gamma * z.logsumexp(-1) - (target * z).sum(-1)
    return row.mean() + beta * (w.softmax(0) * blocks).sum()
