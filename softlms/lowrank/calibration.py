"""Statistics for data-aware factorizations: a layer's inputs, and how much the loss depends on its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import DataCollator, PreTrainedModel

from softlms.architectures import Predicate, Target, check_factorable, find_targets
from softlms.data.inputs import batches, in_eval_mode, token_mask

__all__ = ["LayerStatistics", "calibrate"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one linear layer with n inputs, in float64.

    Attributes
    ----------
    gram : Tensor
        Shape (n, n): mean of x x^T over the tokens, without padding.
    mean_abs : Tensor
        Shape (n,): mean of abs(x).
    fisher : Tensor or None
        Shape (n,): sum over the outputs i of the mean over examples of g_ij^2, with g the gradient of one
        example's loss in W. None if calibrated with ``fisher=False``.
    """

    gram: Tensor
    mean_abs: Tensor
    fisher: Tensor | None = None


def calibrate(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    data_collator: DataCollator,
    *,
    rows: int = 256,
    batch_size: int = 32,
    fisher: bool = False,
    targets: Predicate | None = None,
) -> dict[str, LayerStatistics]:
    """Run the first `rows` rows of a data set through the dense model and collect statistics of its target layers.

    Parameters
    ----------
    model : PreTrainedModel
        Dense; not changed. Dropout is off.
    dataset : datasets.Dataset
        Training rows as from `softlms.encode`; never those on which a score is reported. The model gets every column
        that its forward takes.
    data_collator : callable
        Pads a batch on either side, as for ``transformers.Trainer``.
    rows : int
        Rows to use, at most ``len(dataset)``.
    batch_size : int
        Rows per forward pass. The Fisher information uses one row at a time.
    fisher : bool
        Also collect `LayerStatistics.fisher`; the rows then need labels. For a causal language model use
        ``labels = input_ids`` unshifted: transformers shifts them itself.
    targets : callable, optional
        Selects the layers; see `find_targets`.

    Returns
    -------
    dict
        Statistics of each target by name.

    Raises
    ------
    ValueError
        `rows` is below 1 or exceeds the data set, the model takes none of the columns, labels are missing, a layer
        cannot be factored (it is quantized, for example), or an input is not finite (the layer is named).
    """
    if rows < 1:
        raise ValueError(f"Calibration needs at least one row, got rows={rows}.")
    if rows > len(dataset):
        raise ValueError(f"Calibration needs {rows} rows, the data set has {len(dataset)}: lower rows.")
    if fisher and "labels" not in dataset.column_names:
        raise ValueError("The Fisher information needs a column 'labels': use softlms.encode, or fisher=False.")
    found = find_targets(model, targets)
    check_factorable(found)
    layers = {target.name: target.module for target in found}
    used = dataset.select(range(rows))
    moments = {target.name: _Moments(target.shape[1]) for target in found}
    with in_eval_mode(model):
        with torch.inference_mode(), _watching(layers, moments):
            for batch in batches(model, used, data_collator, batch_size):
                mask = token_mask(batch)
                for moment in moments.values():
                    moment.mask = mask
                model(**batch)
        squares = _fisher(model, found, used, data_collator) if fisher else dict.fromkeys(layers)
    for name, square in squares.items():
        if square is not None and not torch.isfinite(square).all():
            raise ValueError(f"The gradients of {name} are not finite: check the model's weights and dtype.")
    for name, moment in moments.items():
        if not moment.tokens:
            raise ValueError(f"No calibration row reaches {name}: leave it out with targets=...")
        if not torch.isfinite(moment.gram).all():
            raise ValueError(f"The inputs of {name} are not finite: check the model's weights and dtype.")
    return {
        name: LayerStatistics(moment.gram / moment.tokens, moment.absolute / moment.tokens, squares[name])
        for name, moment in moments.items()
    }


class _Moments:
    """Running sums over the tokens seen by a layer."""

    def __init__(self, n: int) -> None:
        self.tokens = 0
        self.gram = torch.zeros(n, n, dtype=torch.float64)
        self.absolute = torch.zeros(n, dtype=torch.float64)
        self.mask: Tensor | None = None  # without a mask every row counts

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        if self.mask is not None:
            if len(x) != self.mask.numel():
                raise ValueError(f"A layer sees {len(x)} rows, the batch has {self.mask.numel()} tokens: leave it out.")
            x = x[self.mask.flatten()]
        x = x.double()
        self.tokens += len(x)
        self.gram += (x.T @ x).cpu()
        self.absolute += x.abs().sum(0).cpu()


@contextmanager
def _watching(layers: dict[str, Any], moments: dict[str, _Moments]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(moments[name].see) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fisher(
    model: PreTrainedModel, targets: list[Target], dataset: datasets.Dataset, data_collator: DataCollator
) -> dict[str, Tensor]:
    """One row at a time: the square of a batch's mean gradient is not the mean of the squares."""
    squares = {target.name: torch.zeros(target.shape[1], dtype=torch.float64) for target in targets}
    weights: list[Any] = [target.module.weight for target in targets]
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for batch in batches(model, dataset, data_collator, 1, labels=True):
            gradients = torch.autograd.grad(model(**batch).loss, weights)
            for target, gradient in zip(targets, gradients, strict=True):
                squares[target.name] += target.as_weight(gradient).double().square().sum(0).cpu()
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {name: square / len(dataset) for name, square in squares.items()}
