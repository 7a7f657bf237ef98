"""Metrics of the tasks, and what a dense teacher says of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sk
from torch.utils.data import DataLoader
from transformers import DataCollator, EvalPrediction, PreTrainedModel

from softlms.calibration import MODEL_INPUTS, in_eval_mode
from softlms.tasks import Task

__all__ = ["METRICS", "add_teacher_logits", "compute_metrics", "evaluate", "mean_loss", "paired_difference"]

# each takes (labels, predictions): class ids, or scores for the correlations
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "f1": lambda y, p: float(sk.f1_score(y, p)),
    "accuracy": lambda y, p: float(sk.accuracy_score(y, p)),
    "matthews": lambda y, p: float(sk.matthews_corrcoef(y, p)),
    "pearson": lambda y, p: float(stats.pearsonr(y, p).statistic),
    "spearman": lambda y, p: float(stats.spearmanr(y, p).statistic),
}


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics as ``transformers.Trainer`` wants them; shares from 0 to 1 (correlations -1 to 1)."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(prediction.predictions)
        predicted = logits.argmax(axis=-1) if task.labels else logits.squeeze(-1)
        return {name: METRICS[name](np.asarray(prediction.label_ids), predicted) for name in task.metrics}

    return compute


def evaluate(
    model: PreTrainedModel, task: Task, dataset: datasets.Dataset, data_collator: DataCollator, batch_size: int = 64
) -> dict[str, float]:
    """The task's metrics of `model` on an encoded data set, without dropout, in the model's own dtype.

    Parameters
    ----------
    model : PreTrainedModel
        Any form: dense, soft or deployed.
    task : Task
    dataset : datasets.Dataset
        One split from `softlms.encode`.
    data_collator : callable
        Pads a batch, as for ``transformers.Trainer``.
    batch_size : int

    Returns
    -------
    dict
        Metric name to value, as in `compute_metrics`.
    """
    prediction = EvalPrediction(_logits(model, dataset, data_collator, batch_size), np.asarray(dataset["labels"]))
    return compute_metrics(task)(prediction)


def add_teacher_logits(
    dataset: datasets.Dataset, teacher: PreTrainedModel, data_collator: DataCollator, batch_size: int = 64
) -> datasets.Dataset:
    """`dataset` with a column "teacher_logits", the (classes,) outputs of `teacher` without dropout.

    Computed once: during training the teacher then costs nothing. Parameters as in `evaluate`.
    """
    return dataset.add_column("teacher_logits", _logits(teacher, dataset, data_collator, batch_size).tolist())


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel, dataset: datasets.Dataset, data_collator: DataCollator, batch_size: int = 64
) -> float:
    """Mean over the rows of the model's own loss, without dropout; parameters as in `evaluate`."""
    rows = dataset.select_columns([c for c in dataset.column_names if c in (*MODEL_INPUTS, "labels")])
    total = 0.0
    with in_eval_mode(model):
        for batch in DataLoader(rows, batch_size, collate_fn=data_collator):
            loss = model(**{k: v.to(model.device) for k, v in batch.items()}).loss
            total += loss.item() * len(batch["labels"])
    return total / len(rows)


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, dataset: datasets.Dataset, data_collator: DataCollator, batch_size: int
) -> np.ndarray:
    """(rows, classes) in float32, in the order of `dataset`."""
    # not through a Trainer: precision is a process-wide state there, and would be that of the last training run
    order = np.argsort(dataset["length"], kind="stable")  # batches of similar length pad little
    rows = dataset.select(order).select_columns([c for c in dataset.column_names if c in MODEL_INPUTS])
    batches = DataLoader(rows, batch_size, collate_fn=data_collator)
    with in_eval_mode(model):
        logits = [model(**{k: v.to(model.device) for k, v in batch.items()}).logits.float().cpu() for batch in batches]
    return torch.cat(logits).numpy()[np.argsort(order)]


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a - b over paired runs, with Student's 95 % interval.

    Parameters
    ----------
    a, b : sequence of float
        One value a seed, in the same order; at least two.

    Returns
    -------
    tuple of float
        Mean, lower and upper end.

    Raises
    ------
    ValueError
        The lengths differ, or there are fewer than two pairs.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"Paired runs of equal number, two or more, are needed; got {len(a)} and {len(b)}.")
    difference = np.asarray(a) - np.asarray(b)
    half = stats.t.ppf(0.975, len(a) - 1) * stats.sem(difference)
    return float(difference.mean()), float(difference.mean() - half), float(difference.mean() + half)
