"""Internal classifiers of Zero Time Waste: a head behind each block but the last, cascaded and ensembled.

Shapes: B rows, L blocks, M = L - 1 heads, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlms.methods.heads import BlockHead

__all__ = ["Exits"]

SPREAD = 0.01  # standard deviation of v at the start


class Exits(nn.Module):
    """Heads m = 1 .. M, each behind its block.

    A cascaded head sees the logits of the one before, normalised and without a gradient through them. An ensemble
    weighs what all heads so far say: log q_m = log softmax(sum_{j <= m} e^{v_mj} log p_j + b_m).

    Parameters
    ----------
    size, classes, number : int
        d, C and M.
    dropout : float
    cascade, ensemble : bool
        With neither, the heads stand alone (SDN); then q is p.

    Notes
    -----
    Zero Time Waste, arXiv 2106.05409; formulas from the authors' code.
    """

    def __init__(
        self, size: int, classes: int, number: int, dropout: float, *, cascade: bool = True, ensemble: bool = True
    ) -> None:
        super().__init__()
        self.classes, self.cascade, self.ensemble = classes, cascade, ensemble
        self.heads = nn.ModuleList(
            BlockHead(size, classes, dropout, classes if cascade and m else 0) for m in range(number)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(classes) for _ in range(number - 1 if cascade else 0))
        if ensemble:
            self.v = nn.Parameter(SPREAD * torch.randn(number, number))
            self.b = nn.Parameter(torch.zeros(number, classes))

    @property
    def number(self) -> int:
        """M."""
        return len(self.heads)

    def says(self, m: int, first: Tensor, before: Tensor | None) -> Tensor:
        """Logits (B, C) of head m, from 0.

        Parameters
        ----------
        m : int
        first : Tensor
            The first token's state behind block m, shape (B, d).
        before : Tensor, optional
            Logits of head m - 1, shape (B, C).
        """
        sees = self.norms[m - 1](before.detach()) if self.cascade and before is not None else None
        logits: Tensor = self.heads[m](first, sees)
        return logits

    def together(self, m: int, logs: Tensor) -> Tensor:
        """log q_m, shape (B, C), of the heads' log p_j, shape (B, m + 1, C)."""
        if not self.ensemble:
            return logs[:, m]
        weights = self.v[m, : m + 1].exp()
        return F.log_softmax((weights[:, None] * logs).sum(1) + self.b[m], dim=-1)

    def forward(self, firsts: Tensor) -> tuple[Tensor, Tensor]:
        """All heads at once: their logits and log q, both (B, M, C), of the first token's states (B, M, d)."""
        logits: list[Tensor] = []
        for m in range(self.number):
            logits.append(self.says(m, firsts[:, m], logits[-1] if logits else None))
        said = torch.stack(logits, dim=1)
        return said, self.all_together(said.log_softmax(-1))

    def all_together(self, logs: Tensor) -> Tensor:
        """log q of all heads, shape (B, M, C), of their log p."""
        return torch.stack([self.together(m, logs[:, : m + 1]) for m in range(self.number)], dim=1)
