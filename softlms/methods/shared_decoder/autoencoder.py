"""The shared decoder: rows of all matrices of one kind are one data set for one autoencoder.

Source: arXiv 2302.04045, settings as in the authors' code (CODE). Where the Tanh stands is not known: here it ends the
decoder, whose rows have length 1 (OURS).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlms.methods.autoencoder import fit
from softlms.methods.shared_decoder.codecs import HALF, Codec, Encoded, Source, halves, numbers

__all__ = ["SharedDecoder", "row_loss"]

COSINE = 0.9091  # share of the direction in the loss; the rest is the root of the mean squared error
EPOCHS, BATCH, LEARNING_RATE = 30, 16, 1e-3
STEP, FACTOR = 10 / 30, 0.8  # share of the epochs after which the learning rate falls, and to what share


def row_loss(rows: Tensor, decoded: Tensor, cosine: float = COSINE) -> Tensor:
    """cosine (1 - cos(w, w')) + (1 - cosine) RMSE, a mean over rows of shape (rows, n)."""
    direction = 1 - F.cosine_similarity(rows, decoded, dim=1)
    distance = (rows - decoded).square().mean(1).clamp(min=1e-12).sqrt()
    return (cosine * direction + (1 - cosine) * distance).mean()


class SharedDecoder(Codec):
    """Codes of x numbers and a norm for each row, and one decoder x - 2x - 4x - n for all matrices.

    Parameters
    ----------
    cosine : float
        See `row_loss`.
    epochs : float
    note : callable
        Called with a line of progress.
    """

    name = "shared-decoder"

    def __init__(
        self, cosine: float = COSINE, epochs: float = EPOCHS, note: Callable[[str], None] = lambda line: None
    ) -> None:
        self.cosine, self.epochs, self.note = cosine, epochs, note

    def least(self, count: int, shape: tuple[int, int]) -> int:
        return self._bytes(1, count, shape)

    def encode(self, source: Source, limit: int) -> Encoded:
        (m, n), count = source.shape, len(source.weights)
        x = 1
        while x < n and self._bytes(x + 1, count, source.shape) <= limit:
            x += 1
        rows = torch.cat(list(source.weights))
        norms = rows.norm(dim=1, keepdim=True)
        encoder, decoder = self._train(rows, x, source.seed)
        with torch.no_grad():
            codes = encoder(rows / norms.clamp(min=1e-12))
        own = [halves(c, s) for c, s in zip(codes.split(m), norms.split(m), strict=True)]
        return Encoded(halves(*decoder.parameters()), own, [{"latent": x}] * count)

    def decode(self, shared: Tensor, own: Tensor, settings: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        (m, n), x = shape, settings["latent"]
        decoder = _layers(x, 2 * x, 4 * x, n)
        stored = numbers(shared, *(tuple(values.shape) for values in decoder.parameters()))
        with torch.no_grad():
            for values, part in zip(decoder.parameters(), stored, strict=True):
                values.copy_(part)
            codes, norms = numbers(own, (m, x), (m, 1))
            return F.normalize(torch.tanh(decoder(codes)), dim=1) * norms

    def _train(self, rows: Tensor, x: int, seed: int) -> tuple[nn.Module, nn.Module]:
        n = rows.shape[1]
        norms = rows.norm(dim=1, keepdim=True)
        ways = rows / norms.clamp(min=1e-12)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, decoder = _layers(n, 8 * x, 4 * x, x), _layers(x, 2 * x, 4 * x, n)

        def loss(chosen: Tensor, progress: float) -> Tensor:
            decoded = F.normalize(torch.tanh(decoder(encoder(ways[chosen]))), dim=1) * norms[chosen]
            return row_loss(rows[chosen], decoded, self.cosine)

        both = nn.ModuleList([encoder, decoder])
        fit(
            both, loss, len(rows), epochs=self.epochs, batch=BATCH, learning_rate=LEARNING_RATE, step=STEP,
            factor=FACTOR, seed=seed, note=self.note,
        )  # fmt: skip
        return encoder, decoder

    def _bytes(self, x: int, count: int, shape: tuple[int, int]) -> int:
        m, n = shape
        decoder = x * 2 * x + 2 * x + 2 * x * 4 * x + 4 * x + 4 * x * n + n
        return HALF * (count * m * (x + 1) + decoder)


def _layers(*sizes: int) -> nn.Sequential:
    """Linear layers with LeakyReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])
