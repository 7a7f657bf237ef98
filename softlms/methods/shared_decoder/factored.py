"""Products of thin factors in float16: an SVD for each matrix, one for all, or sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softlms.methods.shared_decoder.codecs import EMPTY, HALF, Codec, Encoded, Source, halves, numbers

__all__ = ["Kronecker", "SharedSVD", "SingleSVD", "WhitenedSVD"]


class SingleSVD(Codec):
    """The leading components of each matrix; those that are left over go where sigma is largest."""

    name = "svd"

    def least(self, count: int, shape: tuple[int, int]) -> int:
        return HALF * count * sum(shape)

    def encode(self, source: Source, limit: int) -> Encoded:
        factors = [self._factors(source, number) for number in range(len(source.weights))]
        each = HALF * sum(source.shape)
        full, count = min(source.shape), len(factors)
        ranks = [min(full, limit // (each * count))] * count
        for _ in range(limit // each - sum(ranks)):
            open_ = [i for i in range(count) if ranks[i] < full]
            if not open_:
                break
            best = max(open_, key=lambda i: factors[i][2][ranks[i]].item())
            ranks[best] += 1
        own = [halves(left[:, :r], right[:r]) for (left, right, _), r in zip(factors, ranks, strict=True)]
        return Encoded(EMPTY, own, [{"rank": r} for r in ranks])

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        (m, n), r = shape, settings["rank"]
        left, right = numbers(own, (m, r), (r, n))
        return left @ right

    def _factors(self, source: Source, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Left (m, r) and right (r, n) factors, balanced, and the error that each component saves, (r,)."""
        U, sigma, Vh = torch.linalg.svd(source.weights[number], full_matrices=False)
        root = sigma.sqrt()
        return U * root, root[:, None] * Vh, sigma.square()


class WhitenedSVD(SingleSVD):
    """The same, where the error is that of the layer's outputs: leading eigenvectors of W G W^T (SVD-LLM)."""

    name = "whitened-svd"
    needs_inputs = True

    def _factors(self, source: Source, number: int) -> tuple[Tensor, Tensor, Tensor]:
        assert source.grams is not None
        W, G = source.weights[number].double(), source.grams[number].double()
        values, P = torch.linalg.eigh(W @ G @ W.T)
        r = min(source.shape)
        values, P = values.flip(0)[:r], P.flip(1)[:, :r]
        right = P.T @ W
        lengths = right.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        return (P * lengths).float(), (right / lengths[:, None]).float(), values.float()


class SharedSVD(Codec):
    """One SVD of all matrices' rows: a linear decoder (n, r) that all share."""

    name = "shared-svd"

    def least(self, count: int, shape: tuple[int, int]) -> int:
        m, n = shape
        return HALF * (count * m + n)

    def encode(self, source: Source, limit: int) -> Encoded:
        (m, n), count = source.shape, len(source.weights)
        r = min(n, count * m, limit // self.least(count, source.shape))
        rows = torch.cat(list(source.weights)).double()
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :r]
        own = [halves(W.double() @ basis) for W in source.weights]
        return Encoded(halves(basis), own, [{"rank": r}] * count)

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        (m, n), r = shape, settings["rank"]
        (basis,), (codes,) = numbers(shared, (n, r)), numbers(own, (m, r))
        return codes @ basis.T


class Kronecker(Codec):
    """Sums of Kronecker products of two matrices of about equal size, the closest in squared error.

    The entries are rearranged so that a Kronecker product has rank 1; then it is an SVD (Van Loan and Pitsianis 1993).
    """

    name = "kronecker"

    def least(self, count: int, shape: tuple[int, int]) -> int:
        (a, b), (c, d) = self._split(shape)
        return HALF * count * (a * b + c * d)

    def encode(self, source: Source, limit: int) -> Encoded:
        (a, b), (c, d) = self._split(source.shape)
        count = len(source.weights)
        terms = min(a * b, c * d, limit // self.least(count, source.shape))
        own = []
        for W in source.weights:
            rearranged = W.view(a, c, b, d).transpose(1, 2).reshape(a * b, c * d)
            U, sigma, Vh = torch.linalg.svd(rearranged, full_matrices=False)
            root = sigma[:terms].sqrt()
            own.append(halves(U[:, :terms] * root, root[:, None] * Vh[:terms]))
        return Encoded(EMPTY, own, [{"terms": terms}] * count)

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        (a, b), (c, d) = self._split(shape)
        left, right = numbers(own, (a * b, settings["terms"]), (settings["terms"], c * d))
        return (left @ right).view(a, b, c, d).transpose(1, 2).reshape(shape)

    def _split(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes (a, b) and (c, d) with a c = m, b d = n and a b close to c d."""
        m, n = shape
        pairs = [(a, b) for a in _divisors(m) for b in _divisors(n)]
        a, b = min(pairs, key=lambda pair: (pair[0] * pair[1] + m * n // (pair[0] * pair[1]), pair))
        return (a, b), (m // a, n // b)


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
