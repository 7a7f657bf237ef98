"""Sums over the tokens that layers see, in float64; layers that see the same tensor share them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

__all__ = ["Moments", "SharedMoments", "real_tokens"]

TOKENS = 2048  # converted to float64 at once
PANELS = 4  # half of a symmetric product is its other half: this many panels cost 5/8 of it


@dataclass
class Moments:
    """Sums over tokens x, each of shape (n,).

    Attributes
    ----------
    tokens : int
        Their number.
    gram : Tensor
        Shape (n, n): sum of x x^T.
    absolute : Tensor
        Shape (n,): sum of abs(x).
    """

    tokens: int
    gram: Tensor
    absolute: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Sums over the rows of `x`, shape (tokens, n); computed on its device, and returned on the CPU.

        Notes
        -----
        Float32 would not be exact to 1e-6 unless fewer than about 50 products are added at once: where tokens repeat a
        value, as the first token of every text does, rounding errors add up and never cancel. Sums as short as that
        take as long as float64.
        """
        n = x.shape[1]
        width = -(-n // PANELS)
        panels = [slice(start, start + width) for start in range(0, n, width)]
        gram = x.new_zeros(n, n, dtype=torch.float64)
        absolute = x.new_zeros(n, dtype=torch.float64)
        for part in x.split(TOKENS):
            wide = part.double()
            for panel in panels:  # on and below the diagonal
                gram[panel, : panel.stop].addmm_(wide[:, panel].T, wide[:, : panel.stop])
            absolute += wide.abs().sum(0)
        for panel in panels:
            gram[: panel.start, panel] = gram[panel, : panel.start].T
        return cls(len(x), gram.cpu(), absolute.cpu())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.tokens + other.tokens, self.gram + other.gram, self.absolute + other.absolute)

    def __iadd__(self, other: Moments) -> Moments:
        self.tokens += other.tokens
        self.gram += other.gram
        self.absolute += other.absolute
        return self


class SharedMoments:
    """Moments of several layers. Those that see the same tensor share one sum, whose products are computed once.

    Q, K and V of a block read one tensor, and so do gate and up. This is not assumed but seen: there is one sum for
    each set of layers that saw the very same object, unchanged, one after the other. Layers that share a tensor in some
    batches only belong to several sets.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Moments] = {}
        self._forget()

    def _forget(self) -> None:
        self._last: tuple[Tensor, int, Moments] | None = None  # holds the tensor: no other can be mistaken for it
        self._names: tuple[str, ...] = ()

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module], mask: Tensor | None) -> Iterator[None]:
        """Count what these layers see in one batch; tokens where `mask`, shape (batch, length), is false do not count.

        Raises
        ------
        ValueError
            A layer sees something else than the tokens of the batch.
        """
        handles = [layer.register_forward_pre_hook(partial(self._see, name, mask)) for name, layer in layers.items()]
        try:
            yield
            self._store()
        finally:
            self._forget()
            for handle in handles:
                handle.remove()

    def _see(self, name: str, mask: Tensor | None, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if self._last is None or x is not self._last[0] or x._version != self._last[1] or name in self._names:
            self._store()
            self._last = x, x._version, Moments.of(real_tokens(x, mask))
        self._names += (name,)

    def _store(self) -> None:
        if self._last is not None:
            new = self._last[2]
            if self._names in self._sums:
                self._sums[self._names] += new
            else:
                self._sums[self._names] = new
        self._forget()

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean of x x^T and of abs(x) by layer, without layers that saw no token; the sums are used up.

        Layers that saw the same tensors throughout have the same objects.
        """
        sums = {names: moments for names, moments in self._sums.items() if moments.tokens}
        sets = {name: tuple(names for names in sums if name in names) for name in {n for names in sums for n in names}}
        totals = {key: reduce(operator.add, [sums[names] for names in key]) for key in set(sets.values())}
        self._sums = {}
        for total in totals.values():  # in place: there may not be room for two of each
            total.gram /= total.tokens
            total.absolute /= total.tokens
        return {name: (totals[key].gram, totals[key].absolute) for name, key in sets.items()}


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (tokens, n) of `x`, shape (..., n), where `mask` is true; all without a mask.

    Raises
    ------
    ValueError
        They are not tokens of the batch.
    """
    x = x.reshape(-1, x.shape[-1])
    if mask is None:
        return x
    if len(x) != mask.numel():
        raise ValueError(f"A layer sees {len(x)} rows, the batch has {mask.numel()} tokens: leave it out.")
    return x if mask.all() else x[mask.flatten()]
