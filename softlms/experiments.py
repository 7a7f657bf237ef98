"""The runs behind the figures: fine-tune, cut statically, learn ranks; each stored, so that none is done twice.

A run is one method at one seed. Its folder under ``runs/`` is named by a key of everything it depends on: recipe,
encoder, sentences, the library's code and versions. It is written under a temporary name and moved when whole, so a
killed batch continues with the first run that is missing.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from softlms.allocate import ALLOCATIONS, allocate, sensitivity_curves
from softlms.architectures import find_targets
from softlms.budget import Budget, count_parameters
from softlms.calibration import LayerStatistics, calibrate
from softlms.evaluation import add_teacher_logits, evaluate, mean_loss
from softlms.factorize import FACTORIZATIONS, Factors, factorize
from softlms.jobs import Job, available_processes, run_jobs, use_threads
from softlms.masks import MaskTrainer
from softlms.provenance import code_hash, hardware, versions, weights_hash
from softlms.scan import fast_scan
from softlms.surgery import decompose, deploy, truncate
from softlms.tasks import TaskData, encode
from softlms.training import DistillingTrainer, SoftTrainer
from softlms.zoo import Encoder, attention, load_classifier

__all__ = ["PAPER_NAMES", "Bench", "Recipe", "Run", "parse_method"]

# what a run's numbers depend on; plotting and the workbook are not among them
_SOURCES = (
    "thresholds", "losses", "layers", "architectures", "calibration", "factorize", "allocate", "masks", "surgery",
    "budget", "training", "evaluation", "tasks", "glue", "corpus", "zoo", "experiments",
)  # fmt: skip

# a run's numbers do not depend on how many cores are free, nor on whether others run beside it
_THREADS = 1

# the paper's names of two of the pairs
PAPER_NAMES = {"static": "svd+uniform", "adaptive": "svd+soft"}
LEARNED = ("mask", "soft")

Trained = TypeVar("Trained", bound=DistillingTrainer)


def parse_method(method: str) -> tuple[str, str]:
    """Factorization and allocation of a method's name.

    Parameters
    ----------
    method : str
        A pair such as "whitened+energy", or "static" or "adaptive", the paper's names of svd+uniform and svd+soft.
        Allocations are those of `softlms.allocate`, "mask" (`softlms.MaskTrainer`) and "soft" (`softlms.SoftTrainer`).

    Raises
    ------
    ValueError
        No such pair.
    """
    factorization, _, allocation = PAPER_NAMES.get(method, method).partition("+")
    if factorization not in FACTORIZATIONS or allocation not in (*ALLOCATIONS, *LEARNED):
        raise ValueError(
            f"Unknown method {method!r}; known: dense, {', '.join(PAPER_NAMES)}, and a pair FACTORIZATION+ALLOCATION "
            f"of {', '.join(FACTORIZATIONS)} and {', '.join((*ALLOCATIONS, *LEARNED))}."
        )
    return factorization, allocation


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; epochs may be fractions.

    Attributes
    ----------
    dense_learning_rate, dense_epochs
        Fine-tuning of the dense model; 0 epochs take it as it is.
    learning_rate, static_learning_rate
        Training while compressing and recovering (soft thresholds), and after the cut (all others): each has its
        own best.
    epochs
        Length of that training, the same for all; the steps that masks take to learn are among them. 0 leaves a
        method untuned.
    batch_size : int
    distillation : float
        Share of the dense model's logits in the task loss, for all methods alike.
    keep, count
        The budget; see `softlms.budget.Budget`.
    gamma, alpha_learning_rate, deadline, s, unit, compression_loss, weigh_by_size
        See `softlms.training.SoftTrainer` and `softlms.surgery.decompose`.
    start : {"fine-tuned", "pretrained"}
        The weights that are decomposed.
    calibration_rows : int
        Training rows for data-aware factors and for sensitivity (a quarter of them there).
    mask_learning_rate : float
        Of the masks' scores.
    further_keeps : tuple of float
        Smaller budgets that a model with soft thresholds is also cut to after its training, without any more.
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
    deadline: float = 1.0
    s: float = 50.0
    unit: str = "max"
    compression_loss: str = "adaptive"
    weigh_by_size: bool = False
    start: str = "fine-tuned"
    calibration_rows: int = 256
    mask_learning_rate: float = 0.05
    further_keeps: tuple[float, ...] = ()
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
        "method", "seed", "scores" (split, then metric, 0 to 1), "untuned" (those of dev before any training after
        the cut), "ranks" (layer to components), "kept_linear", "kept_total", "steps", "frozen_at" (soft thresholds:
        the step at which the budget was met), "further" (keep to scores on dev; see `Recipe`), "history" (one entry
        a logging step), "seconds" (what several methods share, the teacher's logits, calibration and factors, counts
        for the first that needs it), "hardware", "versions", "encoder", "data".
    model : Path or None
        The saved model, where the run keeps one (the dense ones do).
    """

    result: dict[str, Any]
    model: Path | None = None


@dataclass(eq=False)  # by identity: the same bench, not one like it
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
    _factored: tuple[Any, ...] = field(default=(), init=False, repr=False)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def splits(self) -> dict[str, datasets.Dataset]:
        """Encoded rows of each split, the training split cut to `train_rows`."""
        sentences = dict(self.data.splits)
        if self.train_rows is not None:
            sentences["train"] = sentences["train"].select(range(min(self.train_rows, len(sentences["train"]))))
        return encode(dataclasses.replace(self.data, splits=sentences), self.encoder.tokenizer(), self.max_length)

    def targets(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each layer that is factored, by name."""
        return {target.name: target.shape for target in find_targets(self.skeleton())}

    def skeleton(self) -> PreTrainedModel:
        """What is factored, without memory for its weights."""
        with torch.device("meta"):
            return self.prepare(self.untrained_model())

    def untrained_model(self) -> PreTrainedModel:
        """A dense model whose weights mean nothing: for what depends on shapes alone."""
        # torch counts no FLOPs for its fused attention on a CPU: written out there, as everywhere in this package
        config = AutoConfig.from_pretrained(self.encoder.location, attn_implementation=attention())
        return AutoModelForSequenceClassification.from_config(config)

    @cached_property
    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.encoder.tokenizer())

    def _inputs(self, pair: str) -> dict[str, Any]:
        """Model and data that a method's run depends on."""
        return {
            "encoder": weights_hash(self.encoder.location),
            "task": self.data.task.name,
            "rows": self._rows,
            "max_length": self.max_length,
            "train_rows": self.train_rows,
        }

    @cached_property
    def _rows(self) -> str:
        """Hash of all sentences and labels."""
        content = {split: rows.to_dict() for split, rows in self.data.splits.items()}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def run(self, method: str, recipe: Recipe, seed: int) -> Run:
        """Do a run, or take it from its folder if it is there.

        Parameters
        ----------
        method : str
            "dense", or as for `parse_method`.
        recipe : Recipe
        seed : int
            Of the head, the order of the rows, dropout and the choice of calibration rows. All methods start from the
            dense run of the seed.

        Raises
        ------
        ValueError
            Unknown method.
        """
        stored = self.stored(method, recipe, seed)
        if stored is not None:
            return stored
        pair, folder = self._place(method, recipe, seed)
        if pair != "dense" and (recipe.start == "fine-tuned" or recipe.distillation):
            self.run("dense", recipe, seed)  # first, so that its time is not counted here
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        started = time.monotonic()
        transformers.set_seed(seed)
        do = _dense if pair == "dense" else _soft if pair.endswith("+soft") else _cut
        with use_threads(_THREADS), fast_scan():
            result = {"seed": seed} | do(self, recipe, seed, partial, pair)
        result |= {
            "seconds": round(time.monotonic() - started, 1),
            "hardware": hardware(_THREADS),
            "versions": versions(),
            "encoder": self.encoder.source,
            "data": self.data.source,
        }
        (partial / "result.json").write_text(json.dumps(result, indent=1))
        if (stored := self.stored(method, recipe, seed)) is not None:  # done meanwhile by a process beside this one
            shutil.rmtree(partial)
            return stored
        shutil.rmtree(folder, ignore_errors=True)  # a folder without result.json is no run
        partial.rename(folder)
        return Run(result | {"method": method}, folder / "model" if pair == "dense" else None)

    def stored(self, method: str, recipe: Recipe, seed: int) -> Run | None:
        """A run that was done before, as `run` gives it, or None."""
        pair, folder = self._place(method, recipe, seed)
        if not (folder / "result.json").is_file():
            return None
        result = json.loads((folder / "result.json").read_text())
        return Run(result | {"method": method}, folder / "model" if pair == "dense" else None)

    def _place(self, method: str, recipe: Recipe, seed: int) -> tuple[str, Path]:
        """A method's name in full, and the folder of its run."""
        pair = "dense" if method == "dense" else "+".join(parse_method(method))
        return pair, self.folder / f"{pair}-{seed}-{self._key(pair, recipe, seed)}"

    def runs(self, methods: tuple[str, ...], recipe: Recipe, seeds: tuple[int, ...]) -> list[Run]:
        """All methods at all seeds, in that order; seeds side by side, with a line of progress for each run."""
        started, total = time.monotonic(), len(methods) * len(seeds)
        units = [[Job(self, method, recipe, seed) for method in methods] for seed in seeds]
        runs, metric = {}, self.data.task.metrics[0]
        for done, (job, run) in enumerate(run_jobs(units, available_processes()), 1):
            left = (time.monotonic() - started) / done * (total - done)
            self.note(
                f"{done:>3} of {total}: {job.method:<8} seed {job.seed}, "
                f"dev {metric} {run.result['scores']['dev'][metric]:.3f}, "
                f"{run.result['kept_linear']:.3f} of the linears; about {left / 60:.0f} min left"
            )
            runs[job.method, job.seed] = run
        return [runs[method, seed] for seed in seeds for method in methods]

    def new_model(self) -> PreTrainedModel:
        """What the dense model is trained from; torch's seed decides how what is new in it starts."""
        return self.encoder.for_task(self.data.task)

    def load_model(self, folder: Path) -> PreTrainedModel:
        """A dense model as its run saved it."""
        return load_classifier(folder)

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """What happens to a dense model before it is factored: nothing here."""
        return model

    def extras(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a run's result holds besides scores and counts: nothing here."""
        return {}

    def dense_model(self, recipe: Recipe, seed: int) -> PreTrainedModel:
        """The dense model of `seed`, trained now if it was not before."""
        return self.load_model(self._dense_folder(recipe, seed))

    def _dense_folder(self, recipe: Recipe, seed: int) -> Path:
        folder = self.run("dense", recipe, seed).model
        assert folder is not None  # dense runs keep their model
        return folder

    def training_rows(self, recipe: Recipe, seed: int) -> datasets.Dataset:
        """The training split, with the dense model's logits where the recipe distils; those are stored with it."""
        rows = self.splits["train"]
        if not recipe.distillation:
            return rows
        stored = self._dense_folder(recipe, seed).parent / "teacher_logits.json"
        if not stored.is_file():
            taught = add_teacher_logits(rows, self.dense_model(recipe, seed), self.collator)
            partial = stored.with_suffix(f".partial-{os.getpid()}")
            partial.write_text(json.dumps(list(taught["teacher_logits"])))
            partial.replace(stored)
        return rows.add_column("teacher_logits", json.loads(stored.read_text()))

    def factors(self, model: PreTrainedModel, factorization: str, recipe: Recipe, seed: int) -> dict[str, Factors]:
        """Factors of a dense model; those of one model are kept in memory, to be shared by several allocations."""
        model_key = (self._key("dense", recipe, seed), recipe.start, recipe.calibration_rows)
        if self._factored != model_key:
            self._factored = model_key
            self._known.clear()
        if factorization not in self._known:
            needed = factorization != "svd"
            statistics = self._statistics(model, recipe, seed, factorization == "fwsvd") if needed else None
            self._known[factorization] = factorize(model, factorization, statistics)
        return self._known[factorization]

    def _statistics(
        self, model: PreTrainedModel, recipe: Recipe, seed: int, fisher: bool
    ) -> dict[str, LayerStatistics]:
        key = f"statistics, {fisher=}"
        if key not in self._known:
            rows = self.calibration_rows(recipe.calibration_rows, seed)
            self._known[key] = calibrate(model, rows, self.collator, rows=len(rows), fisher=fisher)
        return self._known[key]

    def curves(self, model: PreTrainedModel, factorization: str, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Sensitivity curves of a dense model, kept in memory like its factors."""
        factors = self.factors(model, factorization, recipe, seed)
        key = f"{factorization}: curves"
        if key not in self._known:
            rows = self.calibration_rows(max(1, recipe.calibration_rows // 4), seed)
            self._known[key] = sensitivity_curves(model, factors, lambda: mean_loss(model, rows, self.collator))
        return self._known[key]

    def calibration_rows(self, number: int, seed: int) -> datasets.Dataset:
        """Training rows drawn by `seed`; all of them where there are fewer."""
        rows = self.splits["train"].shuffle(seed=seed)
        return rows.select(range(min(number, len(rows))))

    def starting_model(self, recipe: Recipe, seed: int) -> PreTrainedModel:
        """What every method cuts: the fine-tuned dense model, or the pretrained encoder with a new head."""
        if recipe.start == "fine-tuned":
            return self.prepare(self.dense_model(recipe, seed))
        transformers.set_seed(seed)
        return self.prepare(self.new_model())

    def scores(self, model: PreTrainedModel, splits: tuple[str, ...] = ("dev", "test")) -> dict[str, dict[str, float]]:
        """Metrics on those of the splits that the task has."""
        present = {split: self.splits[split] for split in splits if split in self.splits}
        return {split: evaluate(model, self.data.task, rows, self.collator) for split, rows in present.items()}

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of a training on `recipe.epochs`."""
        a_epoch = math.ceil(len(self.splits["train"]) / recipe.batch_size)
        return math.ceil(recipe.epochs * a_epoch)

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

    def _key(self, pair: str, recipe: Recipe, seed: int) -> str:
        used = dataclasses.asdict(recipe)
        if pair == "dense":
            used = {k: used[k] for k in ("dense_learning_rate", "dense_epochs", "batch_size", "bf16")}
        else:
            others: tuple[str, ...] = ("static_learning_rate",) if pair.endswith("+soft") else _SOFT_ONLY
            others += () if pair.endswith("+mask") else ("mask_learning_rate",)
            # a plain SVD takes no calibration, unless its allocation does
            others += ("calibration_rows",) if pair.startswith("svd") and not pair.endswith("+sensitivity") else ()
            used = {k: v for k, v in used.items() if k not in others}
        depends = self._inputs(pair) | {
            "recipe": used,
            "seed": seed,
            "code": code_hash(_SOURCES),
            "versions": versions(),
            "hardware": hardware(_THREADS),
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]


_SOFT_ONLY = (
    "learning_rate", "gamma", "alpha_learning_rate", "deadline", "s", "unit", "compression_loss", "weigh_by_size",
    "further_keeps",
)  # fmt: skip


def _dense(bench: Bench, recipe: Recipe, seed: int, folder: Path, pair: str) -> dict[str, Any]:
    model = bench.new_model()
    options = bench.trainer_options(folder, seed, recipe, recipe.dense_learning_rate, recipe.dense_epochs)
    trainer = _train(DistillingTrainer(model, **options)) if recipe.dense_epochs else None
    model.save_pretrained(folder / "model")
    return {
        "scores": bench.scores(model),
        "ranks": {t.name: min(t.shape) for t in find_targets(model)},
    } | _outcome(bench, model, trainer)


def _cut(bench: Bench, recipe: Recipe, seed: int, folder: Path, pair: str) -> dict[str, Any]:
    """Factors, ranks, the cut, recovery."""
    factorization, allocation = parse_method(pair)
    model = bench.starting_model(recipe, seed)
    factors = bench.factors(model, factorization, recipe, seed)
    spent = 0
    if allocation == "mask":
        ranks, spent = _learn_mask(bench, recipe, seed, folder, factors)
    else:
        curves = bench.curves(model, factorization, recipe, seed) if allocation == "sensitivity" else None
        ranks = allocate(model, factors, allocation, keep=recipe.keep, count=recipe.count, curves=curves)
    truncate(model, ranks, factors)
    untuned = bench.scores(model, ("dev",))
    if not recipe.epochs:
        return {"scores": untuned, "untuned": untuned, "ranks": ranks} | _outcome(bench, model, None)
    options = _after_the_cut(bench, recipe, seed, folder, recipe.static_learning_rate)
    trainer = None
    if spent:
        options["args"].max_steps = bench.steps(recipe) - spent
    if spent < bench.steps(recipe):  # a search may take all the steps there are
        trainer = _train(DistillingTrainer(model, **options))
    outcome = _outcome(bench, model, trainer)
    outcome["steps"] += spent
    return {"scores": bench.scores(model), "untuned": untuned, "ranks": ranks, "mask_steps": spent} | outcome


def _learn_mask(
    bench: Bench, recipe: Recipe, seed: int, folder: Path, factors: dict[str, Factors]
) -> tuple[dict[str, int], int]:
    """Ranks from masks, and the steps that it took."""
    trainer = MaskTrainer(
        bench.starting_model(recipe, seed),
        factors,
        keep=recipe.keep,
        count=recipe.count,
        **_after_the_cut(bench, recipe, seed, folder, recipe.mask_learning_rate),
    )
    _train(trainer)
    return trainer.ranks, trainer.state.global_step


def _soft(bench: Bench, recipe: Recipe, seed: int, folder: Path, pair: str) -> dict[str, Any]:
    """Factors, soft thresholds that learn ranks, recovery."""
    model = bench.starting_model(recipe, seed)
    factors = bench.factors(model, parse_method(pair)[0], recipe, seed)
    decompose(model, factors, s=recipe.s, unit=recipe.unit)
    untrained = deploy(copy.deepcopy(model), recipe.keep, recipe.count)
    untuned = bench.scores(untrained, ("dev",))
    if not recipe.epochs:
        return {"scores": untuned, "untuned": untuned, "ranks": _ranks(untrained)} | _outcome(bench, untrained, None)
    trainer = SoftTrainer(
        model,
        keep=recipe.keep,
        count=recipe.count,
        gamma=recipe.gamma,
        alpha_learning_rate=recipe.alpha_learning_rate,
        deadline=recipe.deadline,
        compression_loss=recipe.compression_loss,
        weigh_by_size=recipe.weigh_by_size,
        **_after_the_cut(bench, recipe, seed, folder, recipe.learning_rate),
    )
    _train(trainer)
    ranks = {name: layer.rank for name, layer in trainer.soft_layers.items()}
    further = {
        str(keep): bench.scores(deploy(copy.deepcopy(model), keep, recipe.count), ("dev",))
        for keep in recipe.further_keeps
        if keep < recipe.keep
    }
    deploy(model)
    return {
        "scores": bench.scores(model),
        "untuned": untuned,
        "ranks": ranks,
        "frozen_at": trainer.schedule.frozen_at,
        "further": further,
    } | _outcome(bench, model, trainer)


def _ranks(model: PreTrainedModel) -> dict[str, int]:
    """Of a deployed model; a dense layer counts all its components."""
    return {t.name: getattr(t.module, "rank", min(t.shape)) for t in find_targets(model)}


def _train(trainer: Trained) -> Trained:
    trainer.remove_callback(PrinterCallback)  # the history is stored; a notebook shows one line a run
    trainer.train()
    return trainer


def _after_the_cut(bench: Bench, recipe: Recipe, seed: int, folder: Path, rate: float) -> dict[str, Any]:
    options = bench.trainer_options(folder, seed, recipe, rate, recipe.epochs)
    return options | {"train_dataset": bench.training_rows(recipe, seed), "distillation": recipe.distillation}


def _outcome(bench: Bench, model: PreTrainedModel, trainer: DistillingTrainer | None) -> dict[str, Any]:
    parameters = count_parameters(model)
    return {
        "kept_linear": parameters.kept("linear"),
        "kept_total": parameters.kept("total"),
        "parameters_linear": parameters.linear,
        "parameters_total": parameters.total,
        "steps": trainer.state.global_step if trainer else 0,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry] if trainer else [],
    } | bench.extras(model)
