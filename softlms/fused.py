"""Split GPT-2's fused Q, K and V matrix: each part gets its own singular values, threshold and rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softlms.modules import Replacement, as_linear, make_linear, replace
from softlms.origin import remember

__all__ = ["SplitLinear", "split_fused"]

M = TypeVar("M", bound=nn.Module)


class SplitLinear(Replacement):
    """Three linear layers on the same input, with concatenated outputs.

    Parameters
    ----------
    q, k, v : nn.Linear
        Each with n inputs.
    """

    form = "split"

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        return cls(*_thirds(as_linear(dense)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., 3 m)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def split_fused(model: M) -> M:
    """Split each fused ``c_attn`` of a GPT-2 into ``c_attn.q``, ``c_attn.k`` and ``c_attn.v``.

    Call it before `softlms.calibrate` and `softlms.decompose`. Notebook 06 measures whether it pays off.

    Parameters
    ----------
    model : nn.Module
        A dense GPT-2, changed in place.

    Returns
    -------
    nn.Module
        `model` itself; its outputs do not change.

    Raises
    ------
    ValueError
        The model has no dense fused projection.
    """
    fused = {n: m for n, m in model.named_modules() if n.endswith("attn.c_attn") and isinstance(m, Conv1D)}
    if not fused:
        raise ValueError("This model has no dense attn.c_attn (GPT-2's fused projection): there is nothing to split.")
    remember(model)
    for name, conv in fused.items():
        replace(model, name, SplitLinear(*_thirds(as_linear(conv))))
    return model


def _thirds(linear: nn.Linear) -> list[nn.Linear]:
    weights, biases = linear.weight.detach().chunk(3), linear.bias.detach().chunk(3)
    return [make_linear(*part) for part in zip(weights, biases, strict=True)]
