"""Entry by entry: fewer of them, or fewer bits for each. The baselines that need no structure in a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlms.methods.shared_decoder.codecs import HALF, Codec, Encoded, Source, halves, numbers
from softlms.methods.shared_decoder.factored import EMPTY

__all__ = ["FewBits", "Pruned"]

GROUP = 64  # entries of a row that share a scale and an offset
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
    """k bits for each entry, evenly from the least to the largest of its group; some matrices have k + 1.

    A scale and an offset in float16 for each `GROUP` entries of a row. The further bits go to the matrices in order.
    """

    name = "few-bits"

    def least(self, count: int, shape: tuple[int, int]) -> int:
        return count * self._bytes(shape, 1)

    def encode(self, source: Source, limit: int) -> Encoded:
        count = len(source.weights)
        sizes = {bits: self._bytes(source.shape, bits) for bits in range(1, MOST_BITS + 1)}
        bits = max(b for b, size in sizes.items() if size * count <= limit)
        more = (limit - sizes[bits] * count) // (sizes[bits + 1] - sizes[bits]) if bits < MOST_BITS else 0
        each = [bits + (number < more) for number in range(count)]
        return Encoded(
            EMPTY, [self._pack(W, b) for W, b in zip(source.weights, each, strict=True)], [{"bits": b} for b in each]
        )

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        (m, n), bits = shape, settings["bits"]
        groups = math.ceil(n / GROUP)
        scales = HALF * 2 * m * groups
        low, step = numbers(own[:scales], (m, groups, 1), (m, groups, 1))
        flags = np.unpackbits(own[scales:].numpy(), count=m * groups * GROUP * bits).reshape(-1, bits)
        levels = torch.from_numpy(flags @ (1 << np.arange(bits)[::-1])).view(m, groups, GROUP)
        return (low + step * levels).reshape(m, groups * GROUP)[:, :n].contiguous()

    def _pack(self, W: Tensor, bits: int) -> Tensor:
        m, n = W.shape
        groups = math.ceil(n / GROUP)
        padded = torch.cat([W, W[:, -1:].expand(m, groups * GROUP - n)], dim=1).view(m, groups, GROUP)
        low, high = padded.amin(2, keepdim=True), padded.amax(2, keepdim=True)
        scales = halves(low, (high - low) / (2**bits - 1))
        low, step = numbers(scales, (m, groups, 1), (m, groups, 1))  # as they will be read
        levels = ((padded - low) / step.clamp(min=1e-12)).round().clamp(0, 2**bits - 1).to(torch.uint8)
        flags = np.unpackbits(levels.reshape(-1, 1).numpy(), axis=1)[:, -bits:]
        return torch.cat([scales, torch.from_numpy(np.packbits(flags))])

    def _bytes(self, shape: tuple[int, int], bits: int) -> int:
        m, n = shape
        groups = math.ceil(n / GROUP)
        return HALF * 2 * m * groups + math.ceil(m * groups * GROUP * bits / 8)
