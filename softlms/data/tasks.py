"""Tasks: what each is, where its sentences come from, and how they are tokenized."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from softlms.data import corpus, glue
from softlms.data.hub import at, is_hub, split_revision

__all__ = ["TASKS", "Task", "TaskData", "encode", "load_task"]

HUB_GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A sentence or sentence-pair task.

    Attributes
    ----------
    name : str
    sentences : tuple of str
        Columns with the one or two sentences.
    labels : tuple of str
        Class names in the order of their ids; empty for regression.
    metrics : tuple of str
        The task's own metrics, the main one first; see `softlms.evaluation.metrics.METRICS`.
    """

    name: str
    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        return max(1, len(self.labels))


TASKS = {
    task.name: task
    for task in (
        Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        Task("docpairs", ("sentence1", "sentence2"), ("different", "same"), ("f1", "accuracy")),
    )
}


@dataclass(frozen=True)
class TaskData:
    """A task with its sentences.

    Attributes
    ----------
    task : Task
    splits : mapping
        "train", "dev" and, if its labels are public, "test": data sets with the sentence columns and "label"
        (class id, or score for regression).
    source : str
        Where the sentences come from, for tables and captions.
    """

    task: Task
    splits: Mapping[str, datasets.Dataset]
    source: str


def load_task(name: str, data: str | os.PathLike[str]) -> TaskData:
    """Load the sentences of a task. There is no fallback to another source.

    Parameters
    ----------
    name : str
        A key of `TASKS`.
    data : str or path
        A folder in GLUE's own layout (``data/mrpc/train.tsv`` or ``data/train.tsv``), "hub" for GLUE on the hub
        ("hub@revision": at that commit, tag or branch), or "embedded" for ``docpairs``, made from the docstrings of
        installed libraries.

    Raises
    ------
    ValueError
        Unknown task, a source without this task, or a broken row (file and line are named).
    FileNotFoundError
        The folder or one of its files is missing.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}; known: {', '.join(TASKS)}.")
    task = TASKS[name]
    if (name == "docpairs") != (data == "embedded"):
        raise ValueError(f"Task {name!r} is not in source {str(data)!r}: 'embedded' contains only docpairs.")
    if data == "embedded":
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in corpus.sentence_pairs().items()}
        return TaskData(task, splits, "docstrings of installed libraries")
    if is_hub(data):
        _, revision = split_revision(str(data))
        return TaskData(task, _from_hub(task, revision), f"hub: {HUB_GLUE}/{name}{revision and f'@{revision}'}")
    folder = glue.find_folder(Path(data), name)
    rows = glue.read_folder(folder, name, task.sentences, task.labels)
    return TaskData(task, {split: datasets.Dataset.from_list(r) for split, r in rows.items()}, f"folder: {folder.name}")


def encode(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> dict[str, datasets.Dataset]:
    """Token ids of every split, unpadded (a collator pads each batch), with "labels" and "length".

    Parameters
    ----------
    data : TaskData
    tokenizer : PreTrainedTokenizerBase
    max_length : int
        Maximum number of tokens; in longer pairs the longer sentence is truncated.

    Raises
    ------
    ValueError
        `max_length` leaves no room for one token of each sentence.
    """
    least = tokenizer.num_special_tokens_to_add(pair=len(data.task.sentences) == 2) + len(data.task.sentences)
    if max_length < least:
        raise ValueError(f"max_length must be at least {least}, got {max_length}.")

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        columns = [batch[column] for column in data.task.sentences]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        label = int if data.task.labels else float
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "labels": [label(x) for x in batch["label"]], "length": lengths}

    def split(rows: datasets.Dataset) -> datasets.Dataset:
        # these data sets are small: a cache file on disk gains nothing
        return rows.map(
            tokens, batched=True, remove_columns=rows.column_names, keep_in_memory=True, new_fingerprint="-"
        )

    return {name: split(rows) for name, rows in data.splits.items()}


def _from_hub(task: Task, revision: str) -> dict[str, datasets.Dataset]:
    hub = datasets.load_dataset(HUB_GLUE, task.name, **at(revision))
    splits = {"train": hub["train"], "dev": hub["validation"]}
    # GLUE hides its test labels (-1), except those that were public before
    if set(hub["test"]["label"]) != {-1}:
        splits["test"] = hub["test"]
    return splits
