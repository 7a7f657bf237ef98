"""Losses: two that push thresholds up, and one that preserves the outputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COMPRESSION_LOSSES", "adaptive_compression_loss", "distillation_loss", "linear_compression_loss"]


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


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softened outputs, times temperature^2.

    Parameters
    ----------
    student, teacher : Tensor
        Logits, shape (..., classes). A last axis of size 1 is a regression score; its loss is the mean squared error.
    temperature : float
        Positive; applied to both.

    Returns
    -------
    Tensor
        Scalar: mean over all leading axes, in nats.

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
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    log_p = F.log_softmax(teacher / temperature, dim=-1).flatten(end_dim=-2)
    log_q = F.log_softmax(student / temperature, dim=-1).flatten(end_dim=-2)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _weighted_sum(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss.sum() if weight is None else (weight * loss).sum()
