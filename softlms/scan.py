"""Mamba's selective scan: a loop over time whose state stays in cache, with a backward of its own."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import scan as scan_operator
from transformers.models.mamba import modeling_mamba

__all__ = ["fast_scan", "selective_scan"]

CHUNK = 16  # steps between two states that are kept for the backward
FEW_STATES = 1 << 16  # numbers in h: 16 states of them are 4 MB


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = C_t h_t, from h_0 = 0.

    Parameters
    ----------
    u, dt : Tensor
        Inputs and step sizes (after softplus), shape (batch, d_inner, length).
    A : Tensor
        Shape (d_inner, d_state), negative.
    B, C : Tensor
        Shape (batch, d_state, length).
    compiled : bool
        Where no gradient is wanted, fuse a few steps of time by ``torch.compile``: it needs a C++ compiler, and half a
        minute at the first call with each batch size.

    Returns
    -------
    y : Tensor
        Shape (batch, d_inner, length).
    h : Tensor
        The last state, shape (batch, d_inner, d_state), without a gradient. Both in float32, whatever came in.

    Notes
    -----
    Mamba's recurrence (arXiv 2312.00752, eq. 2); the schedule is ours. Autograd through a plain loop writes a zero
    tensor of batch x d_inner x length x d_state for each step of time; here the backward is written out, and makes a
    chunk's states anew from the one before it: memory grows with length / 16 states, and a step's tensors fit a cache.
    """
    # time first, channels last: a step's slices are contiguous
    over_time = [x.float().permute(2, 0, 1).contiguous() for x in (u, dt, B, C)]
    inputs = (*over_time[:2], A.float().T.contiguous(), *over_time[2:])
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if torch.compiler.is_exporting():
        y, h = _scan_traced(*inputs)
    else:
        y, h = _scan_compiled(*inputs) if compiled and not gradient else _Scan.apply(*inputs)
    return y.permute(1, 2, 0), h.transpose(1, 2)


def _scan_compiled(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    length, batch, d = u.shape
    x, y = dt * u, torch.empty_like(u)
    h = u.new_zeros(batch, len(A), d)
    fused = CHUNK if h.numel() <= FEW_STATES else CHUNK // 4  # what a chunk touches should stay in cache
    whole = length - length % fused
    for first in range(0, whole, fused):
        here = slice(first, first + fused)
        y[here], h = _fused_steps(h, dt[here], A, B[here], C[here], x[here])
    decay = torch.empty_like(h)
    for t in range(whole, length):
        _step(h, decay, dt[t], A, B[t], x[t])
        y[t] = (C[t].unsqueeze(2) * h).sum(1)
    return y, h


def _scan_traced(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """For export: one step of time as a graph, whatever the length."""

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt, x, B, C = now
        h = torch.exp(dt.unsqueeze(1) * A) * h + B.unsqueeze(2) * x.unsqueeze(1)
        return h, (C.unsqueeze(2) * h).sum(1)

    h, y = scan_operator(step, u.new_zeros(u.shape[1], *A.shape), (dt, dt * u, B, C))
    return y, h


@torch.compile(dynamic=False)
def _fused_steps(h: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(len(dt)):
        h = torch.exp(dt[t].unsqueeze(1) * A) * h + B[t].unsqueeze(2) * x[t].unsqueeze(1)
        ys.append((C[t].unsqueeze(2) * h).sum(1))
    return torch.stack(ys), h


def _in_float32(step: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast is off inside: a recurrence over thousands of steps is no place for bfloat16."""

    @functools.wraps(step)
    def wrapped(ctx: Any, first: Tensor, *others: Tensor) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return step(ctx, first, *others)

    return wrapped


class _Scan(torch.autograd.Function):
    """Shapes: u, dt, y (L, b, d); A (N, d); B, C (L, b, N); a state h (b, N, d)."""

    @staticmethod
    @_in_float32
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        length, batch, d = u.shape
        h, decay = u.new_zeros(batch, len(A), d), u.new_empty(batch, len(A), d)
        y, x = torch.empty_like(u), dt * u
        kept = []
        for t in range(length):
            if t % CHUNK == 0:
                kept.append(h.clone())
            _step(h, decay, dt[t], A, B[t], x[t])
            torch.bmm(C[t].unsqueeze(1), h, out=y[t].unsqueeze(1))
        ctx.save_for_backward(u, dt, A, B, C, torch.stack(kept))
        ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    @_in_float32
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        u, dt, A, B, C, kept = ctx.saved_tensors
        x = dt * u
        dx, ddt, dA, dB, dC = (torch.zeros_like(tensor) for tensor in (u, dt, A, B, C))
        dy = dy.contiguous()
        g = torch.zeros_like(kept[0])
        states = kept.new_empty(CHUNK + 1, *kept[0].shape)
        decays = kept.new_empty(CHUNK, *kept[0].shape)
        for c in reversed(range(len(kept))):
            steps = range(c * CHUNK, min((c + 1) * CHUNK, len(u)))
            states[0] = kept[c]
            for i, t in enumerate(steps):
                states[i + 1] = states[i]
                _step(states[i + 1], decays[i], dt[t], A, B[t], x[t])
            here = slice(steps.start, steps.stop)
            dC[here] = (states[1 : len(steps) + 1] @ dy[here].unsqueeze(3)).squeeze(3)
            for i, t in reversed(list(enumerate(steps))):
                g.addcmul_(C[t].unsqueeze(2), dy[t].unsqueeze(1))
                torch.bmm(g, x[t].unsqueeze(2), out=dB[t].unsqueeze(2))
                torch.bmm(B[t].unsqueeze(1), g, out=dx[t].unsqueeze(1))
                g.mul_(decays[i])
                q = states[i].mul_(g)  # gradient of dt_t A
                torch.sum(q * A, 1, out=ddt[t])
                dA += torch.sum(q * dt[t].unsqueeze(1), 0)
        return dx * dt, ddt + dx * u, dA, dB, dC


def _step(h: Tensor, decay: Tensor, dt: Tensor, A: Tensor, B: Tensor, x: Tensor) -> None:
    """h becomes exp(dt A) h + B x in place; `decay` receives exp(dt A)."""
    torch.mul(dt.unsqueeze(1), A, out=decay)
    decay.exp_()
    h.mul_(decay).addcmul_(B.unsqueeze(2), x.unsqueeze(1))


@contextmanager
def fast_scan(*, compiled: bool = False) -> Iterator[None]:
    """Inside, transformers' Mamba takes `selective_scan` wherever it would fall back to its plain loop.

    Parameters
    ----------
    compiled : bool
        See `selective_scan`.

    Where ``mamba_ssm`` brings its kernels to a GPU, under ``use_mambapy``, and in compilation, all is as without it; in
    export the loop over time becomes a scan operator, so that the length stays free.
    """
    kernels = importlib.util.find_spec("mamba_ssm") is not None
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
        on_kernels = kernels and hidden_states.device.type == "cuda"
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if on_kernels or options.get("use_mambapy") or compiling:
            return original(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **options)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        dt = F.softplus(dt) if delta_softplus else dt
        y, h = selective_scan(hidden_states, dt, A, B, C, compiled=compiled)
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
