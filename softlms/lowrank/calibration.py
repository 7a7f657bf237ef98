"""Statistics for data-aware factorizations and allocations: a layer's inputs, and how the loss depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import DataCollator, PreTrainedModel

from softlms.architectures import Predicate, Target, check_factorable, find_targets
from softlms.data.inputs import batches, in_eval_mode, token_mask, without_logits
from softlms.lowrank.moments import SharedMoments, real_tokens

__all__ = ["LayerStatistics", "calibrate", "output_gradients"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one linear layer with m outputs and n inputs, in float64.

    Attributes
    ----------
    gram : Tensor
        Shape (n, n): mean of x x^T over the tokens, without padding. Layers that read the same tensor, such as Q, K
        and V, have the same object.
    mean_abs : Tensor
        Shape (n,): mean of abs(x).
    fisher : Tensor or None
        Shape (n,): sum over the outputs i of the mean over examples of g_ij^2, with g the gradient of one
        example's loss in W. None if calibrated with ``fisher=False``.
    gradient : Tensor or None
        Shape (m, m), in float32 (or the model's dtype, if wider): mean of g g^T over the tokens, without padding, with
        g the gradient of one row's loss in the layer's output at that token. Its trace over m is the mean squared
        gradient. None if calibrated with ``gradient_rows=0``. K-FAC's second factor (arXiv 1503.05671), from the data's
        own labels.
    """

    gram: Tensor
    mean_abs: Tensor
    fisher: Tensor | None = None
    gradient: Tensor | None = None


def calibrate(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    data_collator: DataCollator,
    *,
    rows: int = 256,
    batch_size: int = 32,
    fisher: bool = False,
    gradient_rows: int = 0,
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
    gradient_rows : int
        Also collect `LayerStatistics.gradient` on the first `gradient_rows` of these rows, one at a time; they then
        need labels, as above. One forward and backward pass each, in which no weight has a gradient.
    targets : callable, optional
        Selects the layers; see `find_targets`.

    Returns
    -------
    dict
        Statistics of each target by name.

    Raises
    ------
    ValueError
        `rows` is below 1 or exceeds the data set, `gradient_rows` exceeds `rows`, the model takes none of the columns,
        labels are missing, or a layer cannot be factored (it is quantized, for example). Inputs, a row's loss or
        gradients are not finite, or the loss does not depend on a layer (it is named).

    Notes
    -----
    Memory on the CPU: 8 n^2 bytes for each different input, and with gradients 4 m^2 for each layer. These are 0.8 and
    0.7 GB for SmolLM2-135M, 7.8 and 6.7 GB for TinyLlama.
    """
    if rows < 1:
        raise ValueError(f"Calibration needs at least one row, got rows={rows}.")
    if rows > len(dataset):
        raise ValueError(f"Calibration needs {rows} rows, the data set has {len(dataset)}: lower rows.")
    if not 0 <= gradient_rows <= rows:
        raise ValueError(f"gradient_rows must be 0 to rows ({rows}), got {gradient_rows}.")
    labelled = "labels" in dataset.column_names
    if fisher and not labelled:
        raise ValueError("The Fisher information needs a column 'labels': use softlms.encode, or fisher=False.")
    if gradient_rows and not labelled:
        raise ValueError("The gradients need a column 'labels': use softlms.encode, or gradient_rows=0.")
    found = find_targets(model, targets)
    check_factorable(found)
    used = dataset.select(range(rows))
    with in_eval_mode(model):
        means = _input_means(model, found, used, data_collator, batch_size)
        squares = _fisher(model, found, used, data_collator) if fisher else {}
    gradients = (
        output_gradients(model, used.select(range(gradient_rows)), data_collator, targets) if gradient_rows else {}
    )
    return {name: LayerStatistics(*means[name], squares.get(name), gradients.get(name)) for name in means}


def _input_means(
    model: PreTrainedModel,
    targets: list[Target],
    dataset: datasets.Dataset,
    data_collator: DataCollator,
    batch_size: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means of x x^T and abs(x), the same tensors for layers that see the same input."""
    layers: dict[str, nn.Module] = {target.name: target.module for target in targets}
    spared = without_logits(model, layers.values())
    moments = SharedMoments()
    with torch.inference_mode(False), torch.no_grad():  # inference tensors do not say that they were changed
        for batch in batches(model, dataset, data_collator, batch_size):
            with moments.watching(layers, token_mask(batch)):
                model(**batch, **spared)
    means = moments.means()
    for name in layers:
        if name not in means:
            raise ValueError(f"No calibration row reaches {name}: leave it out with targets=...")
        if not torch.isfinite(means[name][0]).all():
            raise ValueError(f"The inputs of {name} are not finite: check the model's weights and dtype.")
    return {name: means[name] for name in layers}


def _fisher(
    model: PreTrainedModel, targets: list[Target], dataset: datasets.Dataset, data_collator: DataCollator
) -> dict[str, Tensor]:
    """One row at a time: the square of a batch's mean gradient is not the mean of the squares."""
    squares = {target.name: torch.zeros(target.shape[1], dtype=torch.float64) for target in targets}
    weights: list[Any] = [target.module.weight for target in targets]
    with _learning(model, weights):
        for row, batch in enumerate(batches(model, dataset, data_collator, 1, labels=True)):
            gradients = torch.autograd.grad(_loss(model, batch, row), weights)
            for target, gradient in zip(targets, gradients, strict=True):
                squares[target.name] += target.as_weight(gradient).double().square().sum(0).cpu()
    for name, square in squares.items():
        _check_finite(name, square)
    return {name: square / len(dataset) for name, square in squares.items()}


def output_gradients(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    data_collator: DataCollator,
    targets: Predicate | None = None,
) -> dict[str, Tensor]:
    """`LayerStatistics.gradient` of each target, from all rows of a data set; see `calibrate`.

    One row at a time: a batch's loss may weigh its rows by their labels.
    """
    found = find_targets(model, targets)
    sums: dict[str, Tensor] = {}
    tokens: Counter[str] = Counter()
    mask: Tensor | None = None  # of the present row

    def watch(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tokens[name] += len(real_tokens(output.detach(), mask))
        if not output.requires_grad:  # no weight learns: the graph begins at the first targets
            output = output.requires_grad_().clone()  # a model may change its activations in place, but not a leaf
        output.register_hook(partial(add, name))
        return output

    def add(name: str, gradient: Tensor) -> None:
        g = real_tokens(gradient, mask)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if name not in sums:
            sums[name] = g.new_zeros(g.shape[1], g.shape[1])
        sums[name].addmm_(g.T, g)

    handles = [target.module.register_forward_hook(partial(watch, target.name)) for target in found]
    try:
        with in_eval_mode(model), _learning(model, []):
            for row, batch in enumerate(batches(model, dataset, data_collator, 1, labels=True)):
                mask = token_mask(batch)
                loss = _loss(model, batch, row)
                if loss.requires_grad:
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    for target in found:
        name = target.name
        if name not in sums or not sums[name].any():
            raise ValueError(
                f"The loss does not depend on {name}: its gradients are zero on all gradient_rows={len(dataset)} rows. "
                "Raise gradient_rows, or leave the layer out with targets=..."
            )
        _check_finite(name, sums[name])
    return {name: total.div_(tokens[name]).cpu() for name, total in sums.items()}


def _loss(model: PreTrainedModel, batch: dict[str, Any], row: int) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for the labels: load it with the task's head.")
    if not torch.isfinite(loss):  # without labels its gradients would be zeros, and count
        raise ValueError(
            f"The loss of row {row} is {loss.item()}: give each row a label that counts, and check the model's weights "
            "and dtype."
        )
    return loss


def _check_finite(name: str, gradient: Tensor) -> None:
    if not torch.isfinite(gradient).all():
        raise ValueError(f"The gradients of {name} are not finite: check the model's weights and dtype.")


@contextmanager
def _learning(model: nn.Module, weights: Collection[nn.Parameter]) -> Iterator[None]:
    """Only these weights have gradients inside."""
    chosen = {id(weight) for weight in weights}
    learned = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in learned:
            parameter.requires_grad_(id(parameter) in chosen)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, before in learned:
            parameter.requires_grad_(before)
