"""Losses: two that push thresholds up, and one that preserves the outputs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COMPRESSION_LOSSES", "adaptive_compression_loss", "distillation_loss", "linear_compression_loss"]

CHUNK = 64  # outputs; for a vocabulary of 49152 each of their arrays takes 13 MB


def linear_compression_loss(alpha: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_cmp = sum_i w_i (1 - alpha_i): the same push at every alpha.

    Parameters
    ----------
    alpha : Tensor
        Thresholds, shape (layers,).
    weight : Tensor, optional
        Weight of each layer, shape (layers,); default: 1.

    Returns
    -------
    Tensor
        Scalar. Its gradient in alpha_i is -w_i.

    Notes
    -----
    The paper's Fig. 5 shows that it exists and has a constant slope; formula and weights are our reading.
    """
    return _weighted_sum(1 - alpha, weight)


def adaptive_compression_loss(alpha: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_acmp = sum_i w_i exp(-alpha_i): a strong push while alpha is small, fading as it grows.

    Parameters and return value as in `linear_compression_loss`; the gradient in alpha_i is -w_i exp(-alpha_i).

    Notes
    -----
    Fig. 5 of the paper; formula from its successor STAR-KV (arXiv 2606.08382); weights are ours.
    """
    return _weighted_sum(torch.exp(-alpha), weight)


COMPRESSION_LOSSES = {"adaptive": adaptive_compression_loss, "linear": linear_compression_loss}


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, counted: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the softened outputs, times temperature^2.

    Parameters
    ----------
    student, teacher : Tensor
        Logits, shape (..., classes). A last axis of size 1 is a regression score; its loss is the mean squared error.
    temperature : float
        Positive; applied to both.
    counted : Tensor, optional
        Which outputs count, shape (...), bool; default: all. For a language model, those that predict a token.

    Returns
    -------
    Tensor
        Scalar: mean over the outputs that count, in nats.

    Raises
    ------
    ValueError
        Shapes differ, or `temperature` is not positive and finite.

    Notes
    -----
    Hinton et al., arXiv 1503.02531. The successor uses it in place of the task loss.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive finite number, got {temperature!r}.")
    counted = student.new_ones(student.shape[:-1], dtype=torch.bool) if counted is None else counted
    if counted.shape != student.shape[:-1]:
        raise ValueError(f"counted has shape {tuple(counted.shape)}, the outputs have {tuple(student.shape[:-1])}.")
    if student.shape[-1] == 1:
        return F.mse_loss(student[counted].float(), teacher[counted].float())
    student, teacher = student.flatten(end_dim=-2), teacher.flatten(end_dim=-2)
    return _Divergence.apply(student, teacher, counted.flatten(), temperature)


class _Divergence(torch.autograd.Function):
    """Mean of T^2 KL(teacher || student) over the counted rows of (outputs, classes).

    Its gradient in a row of the student is T (q - p) / outputs. Both are computed together, for `CHUNK` rows at a time:
    autograd would keep the log-probabilities of all, several times the memory of the logits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        number = counted.sum()
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), CHUNK):
            part = slice(start, start + CHUNK)
            log_p, log_q = (F.log_softmax(of[part].float() / temperature, dim=-1) for of in (teacher, student))
            p, counts = log_p.exp(), counted[part]
            total += (p * (log_p - log_q)).sum(-1)[counts].sum()
            if gradient is not None:
                gradient[part] = ((log_q.exp() - p) * (temperature / number)).masked_fill(~counts[:, None], 0)
        ctx.save_for_backward(gradient)
        return temperature**2 * total / number

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return above * gradient, None, None, None


def _weighted_sum(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss.sum() if weight is None else (weight * loss).sum()
