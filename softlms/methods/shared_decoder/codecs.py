"""What a codec is: it turns the matrices of one kind into bytes, at most so many, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["EMPTY", "HALF", "Codec", "Encoded", "Source", "halves", "numbers"]

HALF = 2  # bytes of a stored number
EMPTY = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Source:
    """The matrices of one kind.

    Attributes
    ----------
    weights : sequence of Tensor
        Shape (m, n) each, float32.
    grams : sequence of Tensor, optional
        Second moments of each layer's inputs, X^T X, shape (n, n).
    seed : int
        Of whatever is random.
    """

    weights: Sequence[Tensor]
    grams: Sequence[Tensor] | None = None
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.weights[0].shape
        return m, n


@dataclass(frozen=True)
class Encoded:
    """Bytes, as tensors of uint8.

    Attributes
    ----------
    shared : Tensor
        What all matrices need, such as a decoder; it may be empty.
    own : list of Tensor
        What each needs besides.
    settings : list of dict
        What `Codec.decode` needs to know of each, as values for JSON.
    """

    shared: Tensor
    own: list[Tensor]
    settings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all matrices together."""
        return self.shared.numel() + sum(map(Tensor.numel, self.own))


class Codec(ABC):
    """A way to store matrices.

    Attributes
    ----------
    name : str
    needs_inputs : bool
        `encode` reads the second moments of inputs.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False

    @abstractmethod
    def least(self, count: int, shape: tuple[int, int]) -> int:
        """The fewest bytes in which `count` matrices (m, n) can be stored."""

    @abstractmethod
    def encode(self, source: Source, limit: int) -> Encoded:
        """Bytes of all matrices, together at most `limit`, which is at least `least`."""

    @abstractmethod
    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        """One matrix (m, n), float32."""


def halves(*parts: Tensor) -> Tensor:
    """The bytes of numbers in float16, one part after the other."""
    flat = [part.detach().reshape(-1).to("cpu", torch.float16) for part in parts]
    return torch.cat(flat).view(torch.uint8) if flat else EMPTY


def numbers(stored: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """The parts again, float32, in these shapes."""
    flat = stored.clone().view(torch.float16).float()  # a slice may start at an odd byte
    parts, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(flat[start : start + size].view(shape))
        start += size
    return parts
