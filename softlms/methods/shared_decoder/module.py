"""`StoredLinear`: a linear layer that is a few bytes on disk, decoded once when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlms.layers import Ranked
from softlms.methods.shared_decoder.autoencoder import SharedDecoder
from softlms.methods.shared_decoder.codecs import Codec
from softlms.methods.shared_decoder.entries import FewBits, Pruned
from softlms.methods.shared_decoder.factored import Kronecker, SharedSVD, SingleSVD, WhitenedSVD
from softlms.modules import as_linear

__all__ = ["CODECS", "StoredLinear"]

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (SharedDecoder, SingleSVD, WhitenedSVD, SharedSVD, Kronecker, Pruned, FewBits)
}


class StoredLinear(Ranked):
    """y = x W^T + bias with a W that is decoded from bytes, and does not learn.

    It saves disk and download, not time or memory: as a linear layer it counts whole.

    Parameters
    ----------
    shared, own : Tensor
        Bytes (uint8) that all layers of its kind need, and those of this layer. They stay on the CPU.
    bias : nn.Parameter, optional
        Shape (m,).
    codec : str
        A key of `CODECS`.
    settings : mapping
        Its settings for this layer.
    weight : Tensor
        W, shape (m, n), decoded.
    """

    form = "stored"
    bias: nn.Parameter | None
    shared: Tensor
    own: Tensor
    decoded: Tensor

    def __init__(
        self,
        shared: Tensor,
        own: Tensor,
        bias: nn.Parameter | None,
        codec: str,
        settings: Mapping[str, Any],
        weight: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("shared", shared)
        self.register_buffer("own", own)
        self.register_parameter("bias", bias)
        self.register_buffer("decoded", weight, persistent=False)
        self.codec, self.settings = codec, dict(settings)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast what is multiplied; the bytes stay where they are, so that layers go on sharing theirs."""
        stored = {name: self._buffers.pop(name) for name in ("shared", "own")}
        super()._apply(fn, recurse)
        self._buffers |= stored
        return self

    def description(self) -> dict[str, Any]:
        sizes = {"shared": self.shared.numel(), "own": self.own.numel()}
        return {"codec": self.codec, "settings": self.settings, **sizes}

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        linear = as_linear(dense)
        weight = linear.weight.detach()
        shared, own = (weight.new_empty(description[name], dtype=torch.uint8) for name in ("shared", "own"))
        bias = None if linear.bias is None else nn.Parameter(weight.new_empty(len(weight)))
        return cls(shared, own, bias, description["codec"], description["settings"], torch.empty_like(weight))

    def restore(self, name: str, description: Mapping[str, Any]) -> None:
        """Decode the weight."""
        if self.own.is_meta:
            raise ValueError(f"{name} is offloaded by device_map, and must be decoded: give its block a device.")
        device = self.own.device
        self.shared, self.own = self.shared.cpu(), self.own.cpu()
        weight = CODECS[self.codec]().decode(self.shared, self.own, self.settings, self.shape)
        self.decoded = weight.to(device, self.decoded.dtype)

    @property
    def out_features(self) -> int:
        return self.decoded.shape[0]

    @property
    def in_features(self) -> int:
        return self.decoded.shape[1]

    @property
    def rank(self) -> int:
        """All components: it is multiplied like a dense layer."""
        return min(self.shape)

    @property
    def weight(self) -> Tensor:
        return self.decoded

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        return F.linear(x, self.decoded, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec!r}"
