"""What two methods share: the training of an autoencoder whose data are the rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["fit"]


def fit(
    parts: nn.Module,
    loss: Callable[[Tensor, float], Tensor],
    rows: int,
    *,
    epochs: float,
    batch: int,
    learning_rate: float,
    step: float,
    factor: float,
    seed: int,
    note: Callable[[str], None],
) -> None:
    """Train by Adam, in place; the last state is kept, so that nothing is selected.

    Parameters
    ----------
    parts : nn.Module
        All that learns.
    loss : callable
        ``loss(chosen, progress)`` for the numbers of a batch's rows, and the share of the steps that are done.
    rows : int
        In the data set.
    epochs : float
    batch : int
        Rows in a step.
    learning_rate : float
        At first; after each part `step` of the steps it falls to the share `factor`.
    seed : int
        Of the order of the rows.
    note : callable
        Called with a line of progress at each epoch.
    """
    optimizer = torch.optim.Adam(parts.parameters(), learning_rate, fused=True)
    in_epoch = -(-rows // batch)
    total = max(1, round(epochs * in_epoch))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(total * step)), factor)
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for number in range(total):
        order = order or list(torch.randperm(rows, generator=generator).split(batch))[::-1]
        optimizer.zero_grad()
        loss(order.pop(), number / total).backward()
        optimizer.step()
        schedule.step()
        if number % in_epoch == 0:
            note(f"fitting: step {number:,} of {total:,}")
