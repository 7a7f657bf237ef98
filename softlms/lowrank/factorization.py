"""Axis 1 of a low-rank method: how a weight is factored.

Every factorization here is a basis U of a layer's outputs, with columns ordered by a score sigma. They differ in the
error that the leading columns minimize:

    svd        ||W - W'||_F (Eckart-Young); sigma are the singular values
    fwsvd      the same, inputs weighted by the Fisher information (arXiv 2207.00112)
    asvd       the same, inputs weighted by the root of their mean absolute value (arXiv 2312.05821)
    whitened   ||(W - W') X^T||_F, the error of the outputs themselves (arXiv 2403.07378; DRONE's objective)
    kfac       ||L^T (W - W') X^T||_F with L L^T the second moments of the gradients in the outputs: how much the loss
               grows, by its Kronecker-factored curvature (arXiv 1503.05671; the objective of arXiv 2505.17974)

All but the last have an orthonormal U, so that the layer cut to rank r is U_r U_r^T W.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softlms.architectures import Predicate, check_factorable, find_targets
from softlms.layers import svd
from softlms.lowrank.calibration import LayerStatistics
from softlms.modules import as_linear

__all__ = [
    "FACTORIZATIONS",
    "Factors",
    "check_method",
    "factorize",
    "factorize_weight",
    "linear_targets",
]

FACTORIZATIONS = ("svd", "fwsvd", "asvd", "whitened", "kfac")
NEEDS = {"fwsvd": ("fisher",), "asvd": ("mean_abs",), "whitened": ("gram",), "kfac": ("gram", "gradient")}
# the gradients' second moments are of few rows, and noisy: averaged with equal ones for all outputs (ours; 1 was the
# best on dev of SmolLM2 among 0.001 to 10)
DAMPING = 1.0

Statistics = Mapping[str, LayerStatistics]


@dataclass(frozen=True)
class Factors:
    """W = U diag(sigma) V^T with r = min(m, n) components, in descending order of score.

    Attributes
    ----------
    U : Tensor
        Shape (m, r); orthonormal columns, except for "kfac".
    sigma : Tensor
        Shape (r,), descending and positive: the score of each component.
    V : Tensor
        Shape (n, r); orthonormal for "svd" only.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor


def factorize_weight(weight: Tensor, method: str = "svd", statistics: LayerStatistics | None = None) -> Factors:
    """Factor one weight.

    Parameters
    ----------
    weight : Tensor
        W, shape (m, n).
    method : {"svd", "fwsvd", "asvd", "whitened", "kfac"}
    statistics : LayerStatistics, optional
        Needed by all but "svd"; "fwsvd" needs its `fisher`, "kfac" its `gradient`.

    Returns
    -------
    Factors
        In float32 or wider.

    Raises
    ------
    ValueError
        Unknown method, or the required statistics are missing.

    Notes
    -----
    Whitening takes the left singular vectors of W G^(1/2) from W G W^T, the second moments of the outputs. It needs
    neither a root nor an inverse of G, so a rank-deficient G (fewer tokens than inputs) is no special case. Components
    whose outputs the calibration never excites come last, with a small positive score, so that all components together
    still give W.
    """
    check_method(method, ["W"], None if statistics is None else {"W": statistics})
    if method == "svd":
        return Factors(*svd(weight))
    assert statistics is not None  # just checked
    W = weight.detach().double()
    if method == "kfac":  # whitened factors of L^T W, and back
        assert statistics.gradient is not None  # just checked
        upper = _damped_root(statistics.gradient.to(W.device, W.dtype))
        whitened = factorize_weight(upper @ W, "whitened", statistics)
        U, sigma, V = torch.linalg.solve_triangular(upper, whitened.U, upper=True), whitened.sigma, whitened.V
    else:
        U, sigma = _completed(W, *_scored(W, method, statistics))
        # W^T U, not the second factor of the weighted SVD: this avoids dividing by the weights of the inputs
        V = W.T @ U / sigma
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Factors(U.to(dtype), sigma.to(dtype), V.to(dtype))


def factorize(
    model: nn.Module,
    method: str = "svd",
    statistics: Statistics | None = None,
    *,
    targets: Predicate | None = None,
) -> dict[str, Factors]:
    """Factor every target layer of a dense model; the model is not changed.

    Parameters
    ----------
    model : nn.Module
    method : {"svd", "fwsvd", "asvd", "whitened", "kfac"}
    statistics : mapping, optional
        From `softlms.calibrate`; needed by all but "svd".
    targets : callable, optional
        Selects the layers; see `find_targets`.

    Raises
    ------
    ValueError
        As in `factorize_weight` and `linear_targets`, or a layer is missing from the statistics.
    """
    linears = linear_targets(model, targets)
    check_method(method, linears, statistics)
    return {
        name: factorize_weight(linear.weight, method, statistics[name] if statistics else None)
        for name, linear in linears.items()
    }


def check_method(method: str, names: Iterable[str], statistics: Statistics | None) -> None:
    """Raise ValueError for an unknown method, or if the required statistics are missing."""
    if method not in FACTORIZATIONS:
        raise ValueError(f"Unknown factorization {method!r}; known: {', '.join(FACTORIZATIONS)}.")
    if method == "svd":
        return
    known = statistics or {}
    if not known or any(getattr(entry, needed) is None for entry in known.values() for needed in NEEDS[method]):
        also = {"fwsvd": ", fisher=True", "kfac": ", gradient_rows=..."}.get(method, "")
        raise ValueError(f"{method!r} needs statistics=softlms.calibrate(model, rows, collator{also}).")
    for name in names:
        if name not in known:
            raise ValueError(f"{name} is missing from the statistics: calibrate the same model with the same targets.")
        if not all(getattr(known[name], needed).any() for needed in NEEDS[method]):
            raise ValueError(f"The statistics of {name} are all zero: the calibration rows never excite it.")


def linear_targets(model: nn.Module, targets: Predicate | None = None) -> dict[str, nn.Linear]:
    """All target layers by name, checked to be factorable; a Conv1D (GPT-2) becomes the equivalent nn.Linear.

    Raises
    ------
    ValueError
        The family is unknown, a layer is factored already, or its weight is quantized, offloaded, parametrized, shared
        with another layer, not finite or all zeros.
    """
    linears = {}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = find_targets(model, targets)
    check_factorable(found)
    for target in found:
        name, linear = target.name, target.module
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise ValueError(f"{name} is factored already (a {type(linear).__name__}): load the dense model again.")
        if uses[id(linear.weight)] > 1:
            raise ValueError(f"{name}.weight is shared with another layer and cannot be factored alone: leave it out.")
        bad = [parameter for parameter, values in linear.named_parameters() if not torch.isfinite(values).all()]
        if bad:
            raise ValueError(f"{name}.{bad[0]} contains NaN or infinite values: repair the checkpoint first.")
        if not linear.weight.any():
            raise ValueError(f"{name}.weight is all zeros and has no components: leave it out with targets=...")
        linears[name] = as_linear(linear)
    return linears


def _scored(W: Tensor, method: str, statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, r) and values (r,), r = min(m, n), of W S, with S the weights of the inputs."""
    if method == "whitened":
        m, n = W.shape
        # the columns of Q span those of W: at most n x n, not m x m
        Q, R = torch.linalg.qr(W) if m > n else (None, W)
        energies, U = torch.linalg.eigh(R @ statistics.gram.to(W.device) @ R.T)
        U, sigma = U.flip(1), energies.flip(0).clamp(min=0).sqrt()
        return (U if Q is None else Q @ U), sigma
    if method == "asvd":
        weights = statistics.mean_abs.sqrt() + 1e-6
    else:
        assert statistics.fisher is not None  # checked by the caller
        weights = statistics.fisher.sqrt()
    U, sigma, _ = torch.linalg.svd(W * weights.to(W.device), full_matrices=False)
    return U, sigma


def _damped_root(gradient: Tensor) -> Tensor:
    """L^T, upper triangular, shape (m, m), with L L^T the damped second moments of the gradients over their mean.

    Over their mean, so that sigma are in units of the outputs, as with whitening.
    """
    moments = gradient / gradient.diagonal().mean()
    moments.diagonal().add_(DAMPING)
    return torch.linalg.cholesky(moments / (1 + DAMPING)).T


def _completed(W: Tensor, U: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The same, completed if the rank of W S is lower than that of W."""
    if not sigma[0] > 0:
        raise ValueError("The statistics of a layer are all zero: the calibration rows never reach it.")
    floor = sigma[0] * 1e-6  # float32's resolution: the order below it is noise
    rank = int((sigma > floor).sum())
    if rank < len(sigma):
        U = U[:, :rank]
        rest = torch.linalg.svd(W - U @ (U.T @ W), full_matrices=False)[0]
        # twice is enough: removes what the first subtraction left of U
        rest = torch.linalg.qr(torch.cat([U, rest[:, : len(sigma) - rank]], dim=1))[0][:, rank:]
        U = torch.cat([U, rest], dim=1)
    return U, sigma.clamp(min=floor)
