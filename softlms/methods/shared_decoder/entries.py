"""Entry by entry: fewer of them, or fewer bits for each. The baselines that need no structure in a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlms.methods.shared_decoder.codecs import EMPTY, HALF, Codec, Encoded, Source, halves, numbers

__all__ = ["FewBits", "Pruned"]

GROUP = 64  # entries of a row that share a scale and an offset, at most
RANGES = [1 - i / 20 for i in range(14)]  # parts of the range from the least to the largest entry
MOST_BITS = 8


class Pruned(Codec):
    """The largest entries of all matrices in float16, and a bit for each entry: is it there?"""

    name = "pruned"

    def least(self, count: int, shape: tuple[int, int]) -> int:
        return count * math.ceil(math.prod(shape) / 8) + HALF

    def encode(self, source: Source, limit: int) -> Encoded:
        count, size = len(source.weights), math.prod(source.shape)
        left = min(count * size, (limit - count * math.ceil(size / 8)) // HALF)
        entries = torch.cat([W.reshape(-1) for W in source.weights])
        kept = torch.zeros(len(entries), dtype=torch.bool)
        kept[entries.abs().topk(left).indices] = True
        own = [
            torch.cat([torch.from_numpy(np.packbits(mask.numpy())), halves(values[mask])])
            for values, mask in zip(entries.view(count, size), kept.view(count, size), strict=True)
        ]
        return Encoded(EMPTY, own, [{}] * count)

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        size = math.prod(shape)
        masks = math.ceil(size / 8)
        mask = torch.from_numpy(np.unpackbits(own[:masks].numpy(), count=size)).bool()
        W = torch.zeros(size)
        (W[mask],) = numbers(own[masks:], (int(mask.sum()),))
        return W.view(shape)


class FewBits(Codec):
    """k bits for each entry, evenly over a range of its group, the best of `RANGES`; some matrices have k + 1.

    A group is about `GROUP` entries of a row, with a scale and an offset in float16. The further bits go where they
    save the largest squared error.
    """

    name = "few-bits"

    def least(self, count: int, shape: tuple[int, int]) -> int:
        return count * self._bytes(shape, 1)

    def encode(self, source: Source, limit: int) -> Encoded:
        count = len(source.weights)
        sizes = {bits: self._bytes(source.shape, bits) for bits in range(1, MOST_BITS + 1)}
        bits = max(b for b, size in sizes.items() if size * count <= limit)
        own = [self._pack(W, bits) for W in source.weights]
        each = [bits] * count
        if bits < MOST_BITS and (more := (limit - sizes[bits] * count) // (sizes[bits + 1] - sizes[bits])):
            longer = [self._pack(W, bits + 1) for W in source.weights]
            saved = [
                self._error(W, short, bits) - self._error(W, long, bits + 1)
                for W, short, long in zip(source.weights, own, longer, strict=True)
            ]
            for number in sorted(range(count), key=lambda i: -saved[i])[:more]:
                own[number], each[number] = longer[number], bits + 1
        return Encoded(EMPTY, own, [{"bits": b} for b in each])

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        bits, size = settings["bits"], _group(shape[1])
        groups = math.prod(shape) // size
        scales = HALF * 2 * groups
        low, step = numbers(own[:scales], (groups, 1), (groups, 1))
        flags = np.unpackbits(own[scales:].numpy(), count=groups * size * bits).reshape(-1, bits)
        levels = torch.from_numpy(flags @ (1 << np.arange(bits)[::-1])).view(groups, size)
        return (low + step * levels).view(shape)

    def _pack(self, W: Tensor, bits: int) -> Tensor:
        rows = W.reshape(-1, _group(W.shape[1]))
        least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        middle, half = (least + most) / 2, (most - least) / 2
        best = torch.full_like(middle, torch.inf)
        low, step = torch.zeros_like(middle), torch.zeros_like(middle)
        for part in RANGES:
            start = (middle - part * half).half().float()
            width = (2 * part * half / (2**bits - 1)).half().float()
            error = (start + width * _levels(rows, start, width, bits) - rows).square().sum(1, keepdim=True)
            better = error < best
            best, low, step = (
                torch.where(better, a, b) for a, b in zip((error, start, width), (best, low, step), strict=True)
            )
        levels = _levels(rows, low, step, bits).to(torch.uint8)
        flags = np.unpackbits(levels.reshape(-1, 1).numpy(), axis=1)[:, -bits:]
        return torch.cat([halves(low, step), torch.from_numpy(np.packbits(flags))])

    def _error(self, W: Tensor, own: Tensor, bits: int) -> float:
        m, n = W.shape
        return (self.decode(EMPTY, own, {"bits": bits}, (m, n)) - W).square().sum().item()

    def _bytes(self, shape: tuple[int, int], bits: int) -> int:
        return HALF * 2 * (math.prod(shape) // _group(shape[1])) + math.ceil(math.prod(shape) * bits / 8)


def _group(n: int) -> int:
    """Entries of a group: as many as divide a row of n evenly; the row itself if these would be few."""
    most = max(i for i in range(1, min(n, GROUP) + 1) if n % i == 0)
    return most if most >= GROUP // 4 else n


def _levels(rows: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    return ((rows - low) / step.clamp(min=1e-12)).round().clamp(0, 2**bits - 1)
