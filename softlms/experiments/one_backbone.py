"""One small backbone for several tasks: an encoder that is cut before it knows any task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedModel

from softlms.budget import Budget
from softlms.data.encoders import Encoder, attention
from softlms.data.hub import pretrained, weights_hash
from softlms.experiments.bench import Bench
from softlms.experiments.closure import code_behind
from softlms.experiments.store import key
from softlms.lowrank.allocation import allocate
from softlms.lowrank.calibration import calibrate
from softlms.lowrank.factorization import factorize
from softlms.surgery import truncate
from softlms.utils.files import lock
from softlms.utils.machine import hardware, use_threads, versions

__all__ = ["serve", "small_backbone"]

ROWS = 256  # training rows that calibrate, of each task


def small_backbone(benches: Mapping[str, Bench], keep: float) -> Encoder:
    """Cut the pretrained encoder of some tasks to a share of its linears, without training, and save it once.

    Factors are whitened with training rows of all tasks, whose labels are not read; "cliff-energy" chooses the ranks.

    Parameters
    ----------
    benches : mapping
        The bench of each task; all have one encoder.
    keep : float
        See `softlms.Budget`; checked before any work.

    Returns
    -------
    Encoder
        A folder beside the runs.
    """
    Budget(keep)
    first = next(iter(benches.values()))
    rows = {
        task: bench.splits["train"].select(range(min(ROWS, len(bench.splits["train"]))))
        for task, bench in benches.items()
    }
    depends = {
        "encoder": weights_hash(first.encoder.location),
        "rows": {task: list(part["input_ids"]) for task, part in rows.items()},
        "keep": keep,
        "code": code_behind(_cut),
        "versions": versions(),
        "hardware": hardware(1),
    }
    folder = first.folder / f"backbone-{key(depends)}"
    with lock(folder):
        if not folder.is_dir():
            _save(first.encoder, datasets.concatenate_datasets([*rows.values()]), keep, folder)
    return Encoder(str(folder), f"{first.encoder.source}, {keep:.0%} of its linears kept")


def serve(backbone: Encoder, benches: Mapping[str, Bench], adapters: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Load one backbone with the adapters of all tasks, and score each task on dev with its own.

    Parameters
    ----------
    backbone : Encoder
    benches : mapping
        The bench of each task; all have as many classes.
    adapters : mapping
        Folder of each task's adapter, as PEFT saves it.

    Returns
    -------
    dict
        Metrics of each task.
    """
    from peft import PeftModel

    served: Any = None
    with warnings.catch_warnings():  # PEFT asks transformers for an older name of gradient checkpointing
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        for task, folder in adapters.items():
            if served is None:
                model = backbone.for_task(benches[task].data.task)
                served = PeftModel.from_pretrained(model, folder, adapter_name=task)
            else:
                served.load_adapter(folder, adapter_name=task)
    scores = {}
    for task in adapters:
        served.set_adapter(task)
        scores[task] = benches[task].scores(served, ("dev",))["dev"]
    return scores


def _save(encoder: Encoder, rows: datasets.Dataset, keep: float, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")  # what a killed process left is written over
    tokenizer = encoder.tokenizer()
    model = pretrained(AutoModel, encoder.location, attn_implementation=attention())
    with use_threads(1):
        _cut(model, rows, DataCollatorWithPadding(tokenizer), keep)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def _cut(model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollatorWithPadding, keep: float) -> None:
    factors = factorize(model, "whitened", calibrate(model, rows, collator, rows=len(rows)))
    truncate(model, allocate(model, factors, "cliff-energy", keep=keep), factors)
