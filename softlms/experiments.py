"""The runs behind the figures: fine-tune, cut statically, learn ranks; each stored, so that none is done twice.

A run is one method at one seed. Its folder under ``runs/`` is named by a key of everything it depends on: recipe,
encoder, sentences, the library's code and versions. It is written under a temporary name and moved when whole, so a
killed batch continues with the first run that is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from transformers import DataCollatorWithPadding, PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from softlms.architectures import find_targets
from softlms.budget import Budget, count_parameters, uniform_ranks
from softlms.evaluation import add_teacher_logits, evaluate
from softlms.provenance import code_hash, hardware, versions, weights_hash
from softlms.surgery import decompose, deploy, truncate
from softlms.tasks import TaskData, encode
from softlms.training import DistillingTrainer, SoftTrainer
from softlms.zoo import Encoder, load_classifier

__all__ = ["METHODS", "Bench", "Recipe", "Run"]

# what a run's numbers depend on; plotting and the workbook are not among them
_SOURCES = (
    "thresholds", "losses", "layers", "architectures", "surgery", "budget", "training", "evaluation", "tasks", "glue",
    "corpus", "zoo", "experiments",
)  # fmt: skip

Trained = TypeVar("Trained", bound=DistillingTrainer)


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; epochs may be fractions.

    Attributes
    ----------
    dense_learning_rate, dense_epochs
        Fine-tuning of the dense model.
    learning_rate, static_learning_rate
        Training while compressing and recovering (adaptive), and after the cut (static): each has its own best.
    epochs
        Length of that training, the same for both.
    batch_size : int
    distillation : float
        Share of the dense model's logits in the task loss, static and adaptive alike.
    keep, count
        The budget; see `softlms.budget.Budget`.
    gamma, alpha_learning_rate, s, relative, compression_loss, weigh_by_size
        See `softlms.training.SoftTrainer` and `softlms.surgery.decompose`.
    start : {"fine-tuned", "pretrained"}
        The weights that are decomposed.
    bf16 : bool
        Train under bfloat16 autocast; parameters, thresholds and evaluation stay in float32.
    """

    dense_learning_rate: float = 5e-5
    dense_epochs: float = 3
    learning_rate: float = 1e-4
    static_learning_rate: float = 2e-4
    epochs: float = 3
    batch_size: int = 16
    distillation: float = 0.0
    keep: float = 0.5
    count: str = "linear"
    gamma: float = 0.1
    alpha_learning_rate: float = 2e-3
    s: float = 50.0
    relative: bool = True
    compression_loss: str = "adaptive"
    weigh_by_size: bool = False
    start: str = "fine-tuned"
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("fine-tuned", "pretrained"):
            raise ValueError(f"start must be 'fine-tuned' or 'pretrained', got {self.start!r}.")
        Budget(self.keep, self.count)

    def changed(self, **changes: Any) -> Recipe:
        """A copy with other values; a TypeError for a name that is no setting."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Run:
    """What one run left.

    Attributes
    ----------
    result : dict
        "method", "seed", "scores" (split, then metric, 0 to 1), "untuned" (the same before any training after the
        cut), "ranks" (layer to components), "kept_linear", "kept_total", "steps", "frozen_at", "history" (one entry a
        logging step), "seconds", "hardware", "versions", "encoder", "data".
    model : Path or None
        The saved model, where the run keeps one (the dense ones do).
    """

    result: dict[str, Any]
    model: Path | None = None


@dataclass
class Bench:
    """An encoder, a task and a folder: where runs are made and found again.

    Parameters
    ----------
    encoder : Encoder
    data : TaskData
    folder : Path
        Holds a subfolder for each run.
    max_length : int
        Tokens a row at most.
    train_rows : int, optional
        Use only the first rows of the training split.
    """

    encoder: Encoder
    data: TaskData
    folder: Path
    max_length: int = 128
    train_rows: int | None = None
    note: Callable[[str], None] = field(default=print, repr=False)

    @cached_property
    def splits(self) -> dict[str, datasets.Dataset]:
        """Encoded rows of each split, the training split cut to `train_rows`."""
        splits = encode(self.data, self.encoder.tokenizer(), self.max_length)
        if self.train_rows is not None:
            splits["train"] = splits["train"].select(range(min(self.train_rows, len(splits["train"]))))
        return splits

    @cached_property
    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.encoder.tokenizer())

    @cached_property
    def _rows(self) -> str:
        """Hash of all sentences and labels."""
        content = {split: rows.to_dict() for split, rows in self.data.splits.items()}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def run(self, method: str, recipe: Recipe, seed: int) -> Run:
        """Do a run, or take it from its folder if it is there.

        Parameters
        ----------
        method : {"dense", "static", "adaptive"}
        recipe : Recipe
        seed : int
            Of the head, the order of the rows and dropout. Static and adaptive start from the dense run of the seed.

        Raises
        ------
        ValueError
            Unknown method.
        """
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}; known: {', '.join(METHODS)}.")
        if method != "dense" and (recipe.start == "fine-tuned" or recipe.distillation):
            self.run("dense", recipe, seed)  # first, so that its time is not counted here
        folder = self.folder / f"{method}-{seed}-{self._key(method, recipe, seed)}"
        if (folder / "result.json").is_file():
            result = json.loads((folder / "result.json").read_text())
        else:
            partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            started = time.monotonic()
            transformers.set_seed(seed)
            result = {"method": method, "seed": seed} | METHODS[method](self, recipe, seed, partial)
            result |= {
                "seconds": round(time.monotonic() - started, 1),
                "hardware": hardware(),
                "versions": versions(),
                "encoder": self.encoder.source,
                "data": self.data.source,
            }
            (partial / "result.json").write_text(json.dumps(result, indent=1))
            shutil.rmtree(folder, ignore_errors=True)  # a folder without result.json is no run
            partial.rename(folder)
        return Run(result, folder / "model" if (folder / "model").is_dir() else None)

    def runs(self, methods: tuple[str, ...], recipe: Recipe, seeds: tuple[int, ...]) -> Iterator[Run]:
        """All methods at all seeds, seed by seed, with a line of progress and time left for each."""
        started, total = time.monotonic(), len(methods) * len(seeds)
        for done, (seed, method) in enumerate(((s, m) for s in seeds for m in methods), 1):
            run = self.run(method, recipe, seed)
            left = (time.monotonic() - started) / done * (total - done)
            metric = self.data.task.metrics[0]
            self.note(
                f"{done:>3} of {total}: {method:<8} seed {seed}, "
                f"dev {metric} {run.result['scores']['dev'][metric]:.3f}, "
                f"{run.result['kept_linear']:.3f} of the linears; about {left / 60:.0f} min left"
            )
            yield run

    def dense_model(self, recipe: Recipe, seed: int) -> PreTrainedModel:
        """The dense model of `seed`, fine-tuned now if it was not before."""
        folder = self.run("dense", recipe, seed).model
        assert folder is not None  # dense runs keep their model
        return load_classifier(folder)

    def starting_model(self, recipe: Recipe, seed: int) -> PreTrainedModel:
        """What static and adaptive cut: the fine-tuned dense model, or the pretrained encoder with a new head."""
        if recipe.start == "fine-tuned":
            return self.dense_model(recipe, seed)
        transformers.set_seed(seed)
        return self.encoder.for_task(self.data.task)

    def scores(self, model: PreTrainedModel, splits: tuple[str, ...] = ("dev", "test")) -> dict[str, dict[str, float]]:
        """Metrics on those of the splits that the task has."""
        present = {split: self.splits[split] for split in splits if split in self.splits}
        return {split: evaluate(model, self.data.task, rows, self.collator) for split, rows in present.items()}

    def trainer_options(
        self, folder: Path, seed: int, recipe: Recipe, rate: float, epochs: float, logging_steps: int = 10
    ) -> dict[str, Any]:
        """Arguments that all trainers of a run share."""
        args = TrainingArguments(
            str(folder / "trainer"),
            learning_rate=rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=recipe.batch_size,
            weight_decay=0.01,
            warmup_steps=0.06,
            seed=seed,
            bf16=recipe.bf16,
            train_sampling_strategy="group_by_length",
            logging_steps=logging_steps,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU must be asked for in these words
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            log_level="error",
        )
        return {"args": args, "train_dataset": self.splits["train"], "data_collator": self.collator}

    def _key(self, method: str, recipe: Recipe, seed: int) -> str:
        used = dataclasses.asdict(recipe)
        if method == "dense":
            used = {k: used[k] for k in ("dense_learning_rate", "dense_epochs", "batch_size", "bf16")}
        else:
            others = _ADAPTIVE_ONLY if method == "static" else ("static_learning_rate",)
            used = {k: v for k, v in used.items() if k not in others}
        depends = {
            "recipe": used,
            "seed": seed,
            "encoder": weights_hash(self.encoder.location),
            "task": self.data.task.name,
            "rows": self._rows,
            "max_length": self.max_length,
            "train_rows": self.train_rows,
            "code": code_hash(_SOURCES),
            "versions": versions(),
            "hardware": hardware(),
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]


_ADAPTIVE_ONLY = ("learning_rate", "gamma", "alpha_learning_rate", "s", "relative", "compression_loss", "weigh_by_size")


def _dense(bench: Bench, recipe: Recipe, seed: int, folder: Path) -> dict[str, Any]:
    model = bench.encoder.for_task(bench.data.task)
    options = bench.trainer_options(folder, seed, recipe, recipe.dense_learning_rate, recipe.dense_epochs)
    trainer = _train(DistillingTrainer(model, **options))
    model.save_pretrained(folder / "model")
    return _result(bench, model, trainer) | {"ranks": {t.name: min(t.shape) for t in find_targets(model)}}


def _static(bench: Bench, recipe: Recipe, seed: int, folder: Path) -> dict[str, Any]:
    model = bench.starting_model(recipe, seed)
    shapes = {target.name: target.shape for target in find_targets(model)}
    limit = Budget(recipe.keep, recipe.count).limit(shapes, count_parameters(model).rest)
    ranks = uniform_ranks(shapes, limit)
    truncate(model, ranks)
    untuned = bench.scores(model)
    trainer = _train(
        DistillingTrainer(model, **_after_the_cut(bench, recipe, seed, folder, recipe.static_learning_rate))
    )
    return _result(bench, model, trainer) | {"untuned": untuned, "ranks": ranks}


def _adaptive(bench: Bench, recipe: Recipe, seed: int, folder: Path) -> dict[str, Any]:
    model = decompose(bench.starting_model(recipe, seed), s=recipe.s, relative=recipe.relative)
    trainer = SoftTrainer(
        model,
        keep=recipe.keep,
        count=recipe.count,
        gamma=recipe.gamma,
        alpha_learning_rate=recipe.alpha_learning_rate,
        compression_loss=recipe.compression_loss,
        weigh_by_size=recipe.weigh_by_size,
        **_after_the_cut(bench, recipe, seed, folder, recipe.learning_rate),
    )
    _train(trainer)
    ranks = {name: layer.rank for name, layer in trainer.soft_layers.items()}
    deploy(model)
    return _result(bench, model, trainer) | {"ranks": ranks, "frozen_at": trainer.schedule.frozen_at}


METHODS: dict[str, Callable[[Bench, Recipe, int, Path], dict[str, Any]]] = {
    "dense": _dense,
    "static": _static,
    "adaptive": _adaptive,
}


def _train(trainer: Trained) -> Trained:
    trainer.remove_callback(PrinterCallback)  # the history is stored; a notebook shows one line a run
    trainer.train()
    return trainer


def _after_the_cut(bench: Bench, recipe: Recipe, seed: int, folder: Path, rate: float) -> dict[str, Any]:
    options = bench.trainer_options(folder, seed, recipe, rate, recipe.epochs)
    if recipe.distillation:
        teacher = bench.dense_model(recipe, seed)
        options["train_dataset"] = add_teacher_logits(options["train_dataset"], teacher, bench.collator)
    return options | {"distillation": recipe.distillation}


def _result(bench: Bench, model: PreTrainedModel, trainer: DistillingTrainer) -> dict[str, Any]:
    parameters = count_parameters(model)
    return {
        "scores": bench.scores(model),
        "kept_linear": parameters.kept("linear"),
        "kept_total": parameters.kept("total"),
        "parameters_linear": parameters.linear,
        "parameters_total": parameters.total,
        "steps": trainer.state.global_step,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
