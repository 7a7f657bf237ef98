"""Mamba's selective scan on a CPU, as a torch operator with its own backward.

Its loops are imported when they run: numba is a large library, and only Mamba needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import scan as scan_operator
from transformers.models.mamba import modeling_mamba

__all__ = ["fast_scan", "selective_scan"]


def selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = C_t h_t, from h_0 = 0.

    Parameters
    ----------
    u, dt : Tensor
        Inputs and step sizes (after softplus), shape (batch, d_inner, length), on the CPU.
    A : Tensor
        Shape (d_inner, d_state), negative.
    B, C : Tensor
        Shape (batch, d_state, length).

    Returns
    -------
    y : Tensor
        Shape (batch, d_inner, length).
    h : Tensor
        The last state, shape (batch, d_inner, d_state), without gradient. Both are in float32 for any input dtype:
        bfloat16 is too coarse for a recurrence over thousands of steps.

    Raises
    ------
    ImportError
        numba is not installed.

    Notes
    -----
    Mamba's recurrence (arXiv 2312.00752, eq. 2); the schedule is ours. Autograd through a plain loop writes a zero
    tensor of batch x d_inner x length x d_state for each time step. Here the backward is written by hand and recomputes
    each chunk's states from the state before it: memory grows with length / 16 states. The code is compiled at the
    first call (seconds; numba caches the result, or warns if it cannot). In ``torch.compile`` it is one operator.
    """
    # time before channels, so that the slices of a step are contiguous
    inputs = (*(x.float().transpose(1, 2).contiguous() for x in (u, dt)), A.float().T.contiguous(),
              *(x.float().transpose(1, 2).contiguous() for x in (B, C)))  # fmt: skip
    if torch.compiler.is_exporting():
        y, h = _scan_traced(*inputs)
    else:
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        y, h, _ = _scan(*inputs, wanted)
    return y.transpose(1, 2), h.transpose(1, 2)


def _scan_traced(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """For export: one time step as a graph, for any length."""

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt, x, B, C = now
        h = torch.exp(dt.unsqueeze(1) * A) * h + B.unsqueeze(2) * x.unsqueeze(1)
        return h, (C.unsqueeze(2) * h).sum(1)

    over_time = tuple(x.transpose(0, 1).contiguous() for x in (dt, dt * u, B, C))
    h, y = scan_operator(step, u.new_zeros(u.shape[0], *A.shape), over_time)
    return y.transpose(0, 1), h


@torch.library.custom_op("softlms::selective_scan", mutates_args=(), device_types="cpu")
def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, L, d), the last state (b, N, d), and with `keep` the states from which the backward starts."""
    from softlms.kernels.selective_scan_numba import FORWARD_LANES, forward, run_units

    outputs = _outputs(u, dt, A, B, C, keep)
    units = len(u) * -(-u.shape[2] // FORWARD_LANES)
    arrays = (x.numpy() for x in (u, dt, A, B, C, *outputs))
    run_units(forward, units, torch.get_num_threads(), *arrays)
    return outputs


@_scan.register_fake
def _outputs(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    from softlms.kernels.selective_scan_numba import CHUNK

    chunks = -(-u.shape[1] // CHUNK) if keep else 0
    return torch.empty_like(u), u.new_empty(u.shape[0], *A.shape), u.new_empty(u.shape[0], chunks, *A.shape)


@torch.library.custom_op("softlms::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from softlms.kernels.selective_scan_numba import BACKWARD_LANES, backward, run_units

    blocks = -(-u.shape[2] // BACKWARD_LANES)
    parts = (u.new_empty(u.shape[0], *A.shape), *(B.new_empty(blocks, *B.shape) for _ in range(2)))
    du, ddt = torch.empty_like(u), torch.empty_like(u)
    arrays = (x.numpy() for x in (u, dt, A, B, C, kept, dy.contiguous(), du, ddt, *parts))
    run_units(backward, len(u) * blocks, torch.get_num_threads(), *arrays)
    dA, dB, dC = (part.sum(0) for part in parts)
    return du, ddt, dA, dB, dC


@_scan_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dA, dB, dC = (torch.empty_like(x) for x in (u, dt, A, B, C))
    return du, ddt, dA, dB, dC


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # avoids zeros of the size of `kept`


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (None,) * 6 if dy is None else (*_scan_backward(*ctx.saved_tensors, dy), None)


_scan.register_autograd(_gradients, setup_context=_keep_for_backward)


@contextmanager
def fast_scan() -> Iterator[None]:
    """Make transformers' Mamba use `selective_scan` on a CPU, in place of its fallback, a plain loop.

    On other devices and under ``use_mambapy`` nothing changes. In export the loop over time becomes a scan operator, so
    that the length stays dynamic.
    """
    original = modeling_mamba.mamba_selective_scan

    @functools.wraps(original)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        if hidden_states.device.type != "cpu" or options.get("use_mambapy"):
            return original(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **options)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        dt = F.softplus(dt) if delta_softplus else dt
        y, h = selective_scan(hidden_states, dt, A, B, C)
        if D is not None:
            y = y + hidden_states * D[None, :, None]
        if z is not None:
            y = y * F.silu(z)
        y = y.to(hidden_states.dtype)
        return (y, h.to(hidden_states.dtype)) if return_last_state else y

    modeling_mamba.mamba_selective_scan = scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = original
