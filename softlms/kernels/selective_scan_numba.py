"""The loops of Mamba's selective scan, compiled by numba: states stay in the L1 cache.

Shapes: u, dt, y (b, L, d); A (N, d); B, C (b, L, N); a state (b, N, d). A unit of work is one row and `lanes` adjacent
channels, whose states stay in place over all time steps. Units are independent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

try:
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic
except ModuleNotFoundError as error:
    message = "Mamba's fast scan needs numba, which is not installed: pip install 'softlms[mamba]'."
    raise ImportError(message) from error

__all__ = ["BACKWARD_LANES", "CHUNK", "FORWARD_LANES", "backward", "forward", "run_units"]

CHUNK = 16  # steps between two states stored for the backward
FORWARD_LANES, BACKWARD_LANES = 16, 128  # measured: the backward sums over lanes, so it needs many

f32 = np.float32


def _can_keep() -> bool:
    """Whether numba finds a cache folder; there is none if installation and home are read-only."""
    try:
        numba.njit(cache=True)(_can_keep)
    except RuntimeError as error:
        warnings.warn(
            f"Mamba's scan is compiled again in each process, which takes some seconds: {error}; "
            "set NUMBA_CACHE_DIR to a writable folder.",
            stacklevel=2,
        )
        return False
    return True


# sums may be reordered, so that loops over lanes are vectorized; NaN and infinity are preserved
_COMPILED: dict[str, Any] = {
    "nogil": True,
    "cache": _can_keep(),
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}


def run_units(loops: Callable[..., None], units: int, threads: int, *arrays: Any) -> None:
    """Distribute units over threads; the result does not depend on the number of threads."""
    if threads == 1 or units == 1:
        loops(0, units, *arrays)
        return
    ends = [units * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loops, ends[i], ends[i + 1], *arrays) for i in range(threads)]:
            done.result()


@intrinsic
def _two_to_the(context, k):  # type: ignore[no-untyped-def]
    """2 ** k for an int32 from -126 to 127, built as the bits of a float32."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        exponent = builder.add(args[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.int32), code


@numba.njit(inline="always", **_COMPILED)
def _exp(x):  # type: ignore[no-untyped-def]
    """exp in float32 with relative error 5e-6: numba's own is one call per number, this one is vectorized."""
    if x < f32(-87.0):  # not max(), which loses a NaN
        x = f32(-87.0)
    if x > f32(88.0):
        x = f32(88.0)
    k = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - k * f32(0.693147181)
    p = f32(1 / 720)
    p = p * r + f32(1 / 120)
    p = p * r + f32(1 / 24)
    p = p * r + f32(1 / 6)
    p = p * r + f32(0.5)
    p = p * r + f32(1.0)
    p = p * r + f32(1.0)
    return p * _two_to_the(np.int32(k))  # type: ignore[call-arg]


@numba.njit(**_COMPILED)
def forward(first, last, u, dt, A, B, C, y, end, kept):  # type: ignore[no-untyped-def]
    """y, the last state, and the state before each chunk in `kept` (b, L / CHUNK, N, d), unless that is empty."""
    length, d = u.shape[1:]
    states, blocks = A.shape[0], -(-d // FORWARD_LANES)
    h, a = np.empty((states, FORWARD_LANES), f32), np.empty((states, FORWARD_LANES), f32)
    s, x, out = np.zeros(FORWARD_LANES, f32), np.zeros(FORWARD_LANES, f32), np.empty(FORWARD_LANES, f32)
    for unit in range(first, last):
        row, start = unit // blocks, unit % blocks * FORWARD_LANES
        lanes = min(FORWARD_LANES, d - start)
        h[:], a[:] = 0, 0
        for n in range(states):
            for j in range(lanes):
                a[n, j] = A[n, start + j]
        for t in range(length):
            if t % CHUNK == 0 and kept.shape[1]:
                for n in range(states):
                    for j in range(lanes):
                        kept[row, t // CHUNK, n, start + j] = h[n, j]
            for j in range(lanes):
                s[j] = dt[row, t, start + j]
                x[j] = s[j] * u[row, t, start + j]
            out[:] = 0
            for n in range(states):
                b, c = B[row, t, n], C[row, t, n]
                for j in range(FORWARD_LANES):
                    v = _exp(s[j] * a[n, j]) * h[n, j] + b * x[j]
                    h[n, j] = v
                    out[j] += c * v
            for j in range(lanes):
                y[row, t, start + j] = out[j]
        for n in range(states):
            for j in range(lanes):
                end[row, n, start + j] = h[n, j]


@numba.njit(**_COMPILED)
def backward(first, last, u, dt, A, B, C, kept, dy, du, ddt, dA, dB, dC):  # type: ignore[no-untyped-def]
    """Gradients of all inputs: for A one per row (b, N, d), for B and C one per block of lanes (.., b, L, N).

    A chunk's states are recomputed from the state before it, then time runs backwards through them.
    """
    length, d = u.shape[1:]
    states, blocks = A.shape[0], -(-d // BACKWARD_LANES)
    h = np.empty((CHUNK + 1, states, BACKWARD_LANES), f32)
    decay = np.empty((CHUNK, states, BACKWARD_LANES), f32)
    a, g = np.empty((states, BACKWARD_LANES), f32), np.empty((states, BACKWARD_LANES), f32)
    da = np.empty((states, BACKWARD_LANES), f32)
    s, x = np.empty((CHUNK, BACKWARD_LANES), f32), np.empty((CHUNK, BACKWARD_LANES), f32)
    o, dx, ds = np.empty(BACKWARD_LANES, f32), np.empty(BACKWARD_LANES, f32), np.empty(BACKWARD_LANES, f32)
    for unit in range(first, last):
        row, block = unit // blocks, unit % blocks
        start = block * BACKWARD_LANES
        lanes = min(BACKWARD_LANES, d - start)
        a[:], g[:], da[:] = 0, 0, 0
        s[:], x[:], o[:], h[:] = 0, 0, 0, 0  # missing lanes of the last block add nothing to the sums over lanes
        for n in range(states):
            for j in range(lanes):
                a[n, j] = A[n, start + j]
        for chunk in range(kept.shape[1] - 1, -1, -1):
            steps = min(CHUNK, length - chunk * CHUNK)
            for n in range(states):
                for j in range(lanes):
                    h[0, n, j] = kept[row, chunk, n, start + j]
            for k in range(steps):
                t = chunk * CHUNK + k
                for j in range(lanes):
                    s[k, j] = dt[row, t, start + j]
                    x[k, j] = s[k, j] * u[row, t, start + j]
                for n in range(states):
                    b = B[row, t, n]
                    for j in range(BACKWARD_LANES):
                        decay[k, n, j] = _exp(s[k, j] * a[n, j])
                        h[k + 1, n, j] = decay[k, n, j] * h[k, n, j] + b * x[k, j]
            for k in range(steps - 1, -1, -1):
                t = chunk * CHUNK + k
                for j in range(lanes):
                    o[j] = dy[row, t, start + j]
                dx[:], ds[:] = 0, 0
                for n in range(states):
                    b, c = B[row, t, n], C[row, t, n]
                    db, dc = f32(0), f32(0)
                    for j in range(BACKWARD_LANES):
                        dc += h[k + 1, n, j] * o[j]
                        v = g[n, j] + c * o[j]
                        db += v * x[k, j]
                        dx[j] += b * v
                        v *= decay[k, n, j]
                        g[n, j] = v
                        q = v * h[k, n, j]  # gradient of dt_t A
                        ds[j] += q * a[n, j]
                        da[n, j] += q * s[k, j]
                    dB[block, row, t, n], dC[block, row, t, n] = db, dc
                for j in range(lanes):
                    du[row, t, start + j] = dx[j] * s[k, j]
                    ddt[row, t, start + j] = ds[j] + dx[j] * u[row, t, start + j]
        for n in range(states):
            for j in range(lanes):
                dA[row, n, start + j] = da[n, j]
