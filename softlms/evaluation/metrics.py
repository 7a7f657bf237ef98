"""Task metrics, and the logits of a dense teacher on a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor
from transformers import DataCollator, EvalPrediction, PreTrainedModel

from softlms.data.inputs import IGNORED, batches, in_eval_mode, lengths
from softlms.data.tasks import Task, TaskData

__all__ = ["METRICS", "add_teacher_logits", "compute_metrics", "evaluate", "mean_loss", "paired_difference"]

# each takes (labels, predictions): class ids, or scores for the correlations
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "f1": lambda y, p: float(sk.f1_score(y, p)),
    "accuracy": lambda y, p: float(sk.accuracy_score(y, p)),
    "matthews": lambda y, p: float(sk.matthews_corrcoef(y, p)),
    "pearson": lambda y, p: float(stats.pearsonr(y, p).statistic),
    "spearman": lambda y, p: float(stats.spearmanr(y, p).statistic),
}


def compute_metrics(task: Task | TaskData) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics in the form of ``transformers.Trainer``; shares from 0 to 1 (correlations -1 to 1)."""
    task = task.task if isinstance(task, TaskData) else task

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(prediction.predictions)
        predicted = logits.argmax(axis=-1) if task.labels else logits.squeeze(-1)
        return {name: METRICS[name](np.asarray(prediction.label_ids), predicted) for name in task.metrics}

    return compute


def evaluate(
    model: PreTrainedModel,
    task: Task | TaskData,
    dataset: datasets.Dataset,
    data_collator: DataCollator,
    batch_size: int = 64,
) -> dict[str, float]:
    """Compute the task's metrics for `model` on an encoded data set, without dropout, in the model's own dtype.

    Parameters
    ----------
    model : PreTrainedModel
        Dense, soft or deployed. It runs on its current device: move it to the accelerator first.
    task : TaskData or Task
        From `softlms.load_task`, or one of `softlms.TASKS`.
    dataset : datasets.Dataset
        One split from `softlms.encode`, or any with "labels" (class ids, or scores for regression). The model gets
        every column that its forward takes.
    data_collator : callable
        Pads a batch on either side, as for ``transformers.Trainer``.
    batch_size : int

    Returns
    -------
    dict
        Value of each metric by name, as in `compute_metrics`.

    Raises
    ------
    ValueError
        There is no column "labels", or the model takes none of the columns.
    """
    if "labels" not in dataset.column_names:
        raise ValueError(f"Scores need a column 'labels', got {', '.join(dataset.column_names)}: use softlms.encode.")
    prediction = EvalPrediction(_logits(model, dataset, data_collator, batch_size), np.asarray(dataset["labels"]))
    return compute_metrics(task)(prediction)


def add_teacher_logits(
    dataset: datasets.Dataset, teacher: PreTrainedModel, data_collator: DataCollator, batch_size: int = 64
) -> datasets.Dataset:
    """Add a column "teacher_logits" to `dataset`: the (classes,) outputs of `teacher` without dropout.

    Computed once, so the teacher costs nothing during training. Parameters as in `evaluate`; no labels are needed.
    """
    return dataset.add_column("teacher_logits", _logits(teacher, dataset, data_collator, batch_size).tolist())


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel, dataset: datasets.Dataset, data_collator: DataCollator, batch_size: int = 64
) -> float:
    """The model's own loss without dropout, as a mean over the labels, however they are batched; see `evaluate`.

    Raises
    ------
    ValueError
        The model takes none of the columns, or returns no loss because the rows have no labels that count.
    """
    total, number = 0.0, 0
    with in_eval_mode(model):
        for batch in batches(model, dataset, data_collator, batch_size, labels=True):
            loss, counted = getattr(model(**batch), "loss", None), _counted(batch)
            if loss is not None and counted:
                total += loss.item() * counted
                number += counted
    if not number:
        raise ValueError(f"{type(model).__name__} returns no loss: the rows have no labels that count.")
    return total / number


def _counted(batch: Mapping[str, Tensor]) -> int:
    """Number of labels that a batch's loss is a mean over: tokens for a language model, else rows."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return len(next(iter(batch.values())))
    return int((labels != IGNORED).sum())


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, dataset: datasets.Dataset, data_collator: DataCollator, batch_size: int
) -> np.ndarray:
    """(rows, classes) in float32, in the order of `dataset`."""
    # not a Trainer: its precision is process-wide state, and would be that of the last training run
    order = np.argsort(lengths(dataset), kind="stable")  # batches of similar length need little padding
    with in_eval_mode(model):
        rows = batches(model, dataset.select(order), data_collator, batch_size)
        logits = [model(**batch).logits.float().cpu() for batch in rows]
    return torch.cat(logits).numpy()[np.argsort(order)]


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a - b over paired runs, with Student's 95 % interval.

    Parameters
    ----------
    a, b : sequence of float
        One value per seed, in the same order; at least two.

    Returns
    -------
    tuple of float
        Mean, lower and upper bound.

    Raises
    ------
    ValueError
        The lengths differ, or there are fewer than two pairs.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"Paired runs are needed, two or more, and equally many; got {len(a)} and {len(b)}.")
    difference = np.asarray(a) - np.asarray(b)
    half = stats.t.ppf(0.975, len(a) - 1) * stats.sem(difference)
    return float(difference.mean()), float(difference.mean() - half), float(difference.mean() + half)
