"""How the codes and the decoder are found: by the direction loss, by an SVD, or by an SVD weighted by frequency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlms.methods.autoencoder import fit

__all__ = ["FITS", "Codes", "direction_loss", "fit_direction", "fit_frequency", "fit_svd", "latent_size"]

COSINE, DISTANCE = 0.1995, 0.0025  # weights of the two terms
FALLING = 20 / 30  # share of the epochs in which the exponent falls
LAST_EXPONENT = 0.1
LEARNING_RATE, BATCH = 1e-3, 32
STEP = 4 / 30  # share of the epochs after which the learning rate halves

Note = Callable[[str], None]


@dataclass(frozen=True)
class Codes:
    """E' = C W^T + b.

    Attributes
    ----------
    codes : Tensor
        C, shape (V, k).
    decoder : Tensor
        W, shape (d, k).
    bias : Tensor
        b, shape (d,).
    """

    codes: Tensor
    decoder: Tensor
    bias: Tensor

    def table(self) -> Tensor:
        """E', shape (V, d)."""
        return self.codes @ self.decoder.T + self.bias


def latent_size(words: int, size: int, times: float) -> int:
    """The largest k with V k + d k + d numbers at most V d / times.

    Examples
    --------
    >>> latent_size(30522, 384, 5)
    75
    """
    return int((words * size / times - size) // (words + size))


def direction_loss(rows: Tensor, decoded: Tensor, exponent: float) -> Tensor:
    """Mean over rows of .1995 (1 - cos(e, e')) + .0025 mean_j (abs(e_j - e'_j) + 1e-10)^exponent.

    Parameters
    ----------
    rows, decoded : Tensor
        Shape (rows, d).
    exponent : float
        From 1, an absolute error, to 0.1, which counts an error whatever its size.

    Notes
    -----
    arXiv 2106.08181; weights and exponents as in the authors' code (CODE).
    """
    cosine = F.cosine_similarity(rows, decoded, dim=-1)
    distance = ((rows - decoded).abs() + 1e-10).pow(exponent).mean(-1)
    return (COSINE * (1 - cosine) + DISTANCE * distance).mean()


def fit_direction(table: Tensor, k: int, counts: Tensor, epochs: float, seed: int, note: Note) -> Codes:
    """A linear autoencoder of the rows, trained by the direction loss.

    It starts from the SVD of the rows scaled to length 1, which is close to the best in direction already (OURS). The
    exponent falls in two thirds of the epochs; rates, batch and schedule are the authors' (CODE). The last state is
    taken, so that nothing is selected.

    Parameters
    ----------
    table : Tensor
        E, shape (V, d).
    k : int
        Numbers for each word.
    counts : Tensor
        Shape (V,): how often each word occurs; not used here.
    epochs : float
        Passes over the rows.
    seed : int
        Of the order of the rows.
    note : callable
        Called with a line of progress.
    """
    V, d = table.shape
    basis = _leading(F.normalize(table, dim=1), k)
    encoder, decoder = nn.Linear(d, k), nn.Linear(k, d)
    with torch.no_grad():
        encoder.weight.copy_(basis.T)
        decoder.weight.copy_(basis)
        encoder.bias.zero_()
        decoder.bias.zero_()
    both = nn.ModuleList([encoder, decoder]).to(table.device)

    def loss(chosen: Tensor, progress: float) -> Tensor:
        rows = table[chosen.to(table.device)]
        return direction_loss(rows, decoder(encoder(rows)), 1 - (1 - LAST_EXPONENT) * min(1, progress / FALLING))

    fit(
        both, loss, V, epochs=epochs, batch=BATCH, learning_rate=LEARNING_RATE, step=STEP, factor=0.5, seed=seed,
        note=note,
    )  # fmt: skip
    with torch.no_grad():
        return Codes(encoder(table), decoder.weight.detach(), decoder.bias.detach())


def fit_svd(table: Tensor, k: int, counts: Tensor, epochs: float, seed: int, note: Note) -> Codes:
    """The k leading components of the centred rows: the least squared error. See `fit_direction`."""
    return _projected(table, k, torch.ones_like(counts))


def fit_frequency(table: Tensor, k: int, counts: Tensor, epochs: float, seed: int, note: Note) -> Codes:
    """The same, where an error counts as often as its word occurs, and once more. See `fit_direction`."""
    return _projected(table, k, counts + 1)


Fit = Callable[[Tensor, int, Tensor, float, int, Note], Codes]
FITS: dict[str, Fit] = {
    "direction": fit_direction,
    "svd": fit_svd,
    "frequency": fit_frequency,
}


def _projected(table: Tensor, k: int, weights: Tensor) -> Codes:
    """Least squared error of rows with weights (V,), among all codes, decoders and biases."""
    share = (weights.double() / weights.sum())[:, None]
    wide = table.double()
    bias = (share * wide).sum(0)
    basis = _leading((wide - bias) * share.sqrt(), k).to(table.dtype)
    bias = bias.to(table.dtype)
    return Codes((table - bias) @ basis, basis, bias)


def _leading(rows: Tensor, k: int) -> Tensor:
    """The k leading right singular vectors of rows (V, d), shape (d, k)."""
    wide = rows.double()
    return torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -k:].flip(1).to(rows.dtype)
