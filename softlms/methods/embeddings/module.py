"""The compressed table: `CompressedEmbedding` looks rows up, `CompressedHead` multiplies by all of them.

Shapes: the table E is (V, d), V words of d numbers; codes C are (V, k), the decoder W is (d, k) with a bias b (d,).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlms.kernels.lazy import lazy_product
from softlms.modules import Replacement

__all__ = ["CompressedEmbedding", "CompressedHead", "Decoder", "Table"]


class Decoder(nn.Module):
    """c W^T + b. It is no nn.Linear, which adapters would wrap, and a tied head would not see.

    Parameters
    ----------
    weight : Tensor
        W, shape (d, k).
    bias : Tensor
        b, shape (d,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, codes: Tensor) -> Tensor:
        """(..., k) to (..., d)."""
        return F.linear(codes, self.weight, self.bias)


class Table(Replacement):
    """E' = C W^T + b: V k + d k + d numbers instead of V d."""

    codes: nn.Embedding
    decoder: Decoder

    def description(self) -> dict[str, Any]:
        return {"latent": self.codes.weight.shape[1], "words": len(self.codes.weight)}

    @property
    def words(self) -> int:
        """V."""
        return len(self.codes.weight)


class CompressedEmbedding(Table):
    """Looks codes up and decodes them.

    Parameters
    ----------
    codes : nn.Embedding
        Shape (V, k), with the padding index of the dense table.
    decoder : Decoder
    """

    form = "compressed embedding"

    def __init__(self, codes: nn.Embedding, decoder: Decoder) -> None:
        super().__init__()
        self.codes, self.decoder = codes, decoder

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        k, V, d = description["latent"], description["words"], dense.embedding_dim
        weight = dense.weight
        codes = nn.Embedding(V, k, dense.padding_idx, _weight=weight.new_empty(V, k))
        return cls(codes, Decoder(weight.new_empty(d, k), weight.new_empty(d)))

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.words

    @property
    def embedding_dim(self) -> int:
        """d."""
        return len(self.decoder.bias)

    @property
    def padding_idx(self) -> int | None:
        """The row that gets no gradient through its code."""
        return self.codes.padding_idx

    @property
    def weight(self) -> Tensor:
        """E', shape (V, d), computed when it is used."""
        one = self.codes.weight.new_ones(self.words, 1)
        left = torch.cat([self.codes.weight, one], dim=1)
        return lazy_product(left, torch.cat([self.decoder.weight.T, self.decoder.bias[None]]))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., d)."""
        return self.decoder(self.codes(ids))

    def resized(self, words: int) -> CompressedEmbedding:
        """The same with other rows at the end, or without some: a new row is the mean of all."""
        old = self.codes.weight.detach()
        added = old.mean(0, keepdim=True).expand(max(0, words - len(old)), -1)
        padding = self.padding_idx if self.padding_idx is not None and self.padding_idx < words else None
        codes = nn.Embedding(words, old.shape[1], padding, _weight=torch.cat([old[:words], added]))
        codes.weight.requires_grad_(self.codes.weight.requires_grad)
        return CompressedEmbedding(codes, self.decoder)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class CompressedHead(Table):
    """Logits through the decoder first: h E'^T = (h W) C^T + h b, k (d + V) products instead of d V.

    Parameters
    ----------
    codes, decoder
        Those of the embedding that the head is tied to.
    bias : nn.Parameter, optional
        The head's own, shape (V,).
    """

    form = "compressed head"
    bias: nn.Parameter | None

    def __init__(self, codes: nn.Embedding, decoder: Decoder, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.codes, self.decoder = codes, decoder
        self.register_parameter("bias", bias)  # it may be tied too, as BERT's

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        k, V = description["latent"], description["words"]
        weight = dense.weight
        codes = nn.Embedding(V, k, _weight=weight.new_empty(V, k))
        decoder = Decoder(weight.new_empty(dense.in_features, k), weight.new_empty(dense.in_features))
        return cls(codes, decoder, None if dense.bias is None else nn.Parameter(weight.new_empty(V)))

    @property
    def out_features(self) -> int:
        """V."""
        return self.words

    @property
    def in_features(self) -> int:
        """d."""
        return len(self.decoder.bias)

    def resized(self, embedding: CompressedEmbedding) -> CompressedHead:
        """The head of a resized embedding; new words have a bias of 0."""
        bias = self.bias
        if bias is not None:
            added = embedding.words - len(bias)
            kept = bias.detach()[: embedding.words]
            bias = nn.Parameter(F.pad(kept, (0, max(0, added))), requires_grad=bias.requires_grad)
        return CompressedHead(embedding.codes, embedding.decoder, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., V)."""
        logits = F.linear(hidden @ self.decoder.weight, self.codes.weight, self.bias)
        return logits + (hidden @ self.decoder.bias)[..., None]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
