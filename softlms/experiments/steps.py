"""What the methods do with a bench's model: train it, cut it and let it recover, or learn its ranks."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.distillation import DistillingTrainer
from softlms.evaluation import add_teacher_logits, mean_loss
from softlms.experiments.recipe import Recipe, parse_method
from softlms.files import last_checkpoint, whole_file
from softlms.lowrank.allocation import allocate, sensitivity_curves
from softlms.lowrank.calibration import LayerStatistics, calibrate
from softlms.lowrank.factorization import Factors, factorize
from softlms.lowrank.masks import MaskTrainer
from softlms.machine import device
from softlms.surgery import decompose, deploy, truncate
from softlms.training import SoftTrainer

if TYPE_CHECKING:
    from softlms.experiments.bench import Bench

__all__ = ["Step", "cut_and_recover", "learn_ranks", "train_dense"]

Trained = TypeVar("Trained", bound=DistillingTrainer)
Step = Callable[["Bench", Recipe, int, Path, str], dict[str, Any]]

SAVE_STEPS = 250  # a dense model may take hours; what comes after the cut takes minutes


def train_dense(bench: Bench, recipe: Recipe, seed: int, folder: Path, pair: str) -> dict[str, Any]:
    model = bench.new_model().to(device())
    options = bench.trainer_options(folder, seed, recipe, recipe.dense_learning_rate, recipe.dense_epochs)
    options["args"].set_save("steps", steps=SAVE_STEPS, total_limit=1)
    checkpoints = Path(options["args"].output_dir)
    trainer = _train(DistillingTrainer(model, **options), last_checkpoint(checkpoints)) if recipe.dense_epochs else None
    model.save_pretrained(folder / "model")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "scores": bench.scores(model),
        "ranks": {t.name: min(t.shape) for t in find_targets(model)},
    } | _outcome(bench, model, trainer)


def cut_and_recover(bench: Bench, recipe: Recipe, seed: int, folder: Path, pair: str) -> dict[str, Any]:
    """Factors, ranks, the cut, recovery."""
    factorization, allocation = parse_method(pair)
    model = bench.starting_model(recipe, seed)
    factors = _factors(bench, model, factorization, recipe, seed)
    spent = 0
    if allocation == "mask":
        ranks, spent = _learn_mask(bench, recipe, seed, folder, factors)
    else:
        curves = _curves(bench, model, factorization, recipe, seed) if allocation == "sensitivity" else None
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


def learn_ranks(bench: Bench, recipe: Recipe, seed: int, folder: Path, pair: str) -> dict[str, Any]:
    """Factors, soft thresholds that learn ranks, recovery."""
    model = bench.starting_model(recipe, seed)
    factors = _factors(bench, model, parse_method(pair)[0], recipe, seed)
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


def _training_rows(bench: Bench, recipe: Recipe, seed: int) -> datasets.Dataset:
    """The training split, with the dense model's logits where the recipe distils; those are stored with it."""
    rows = bench.splits["train"]
    if not recipe.distillation:
        return rows
    stored = bench.dense_folder(recipe, seed).parent / "teacher_logits.json"
    if not stored.is_file():
        taught = add_teacher_logits(rows, bench.dense_model(recipe, seed), bench.collator)
        with whole_file(stored) as partial:
            partial.write_text(json.dumps(list(taught["teacher_logits"])), "utf-8")
    return rows.add_column("teacher_logits", json.loads(stored.read_text("utf-8")))


def _factors(bench: Bench, model: PreTrainedModel, factorization: str, recipe: Recipe, seed: int) -> dict[str, Factors]:
    """Factors of a dense model, to be shared by several allocations."""
    known = bench.shared(recipe, seed)
    if factorization not in known:
        needed = factorization != "svd"
        statistics = _statistics(bench, model, recipe, seed, factorization == "fwsvd") if needed else None
        known[factorization] = factorize(model, factorization, statistics)
    return known[factorization]


def _statistics(
    bench: Bench, model: PreTrainedModel, recipe: Recipe, seed: int, fisher: bool
) -> dict[str, LayerStatistics]:
    known, name = bench.shared(recipe, seed), f"statistics, {fisher=}"
    if name not in known:
        rows = _calibration_rows(bench, recipe.calibration_rows, seed)
        known[name] = calibrate(model, rows, bench.collator, rows=len(rows), fisher=fisher)
    return known[name]


def _curves(bench: Bench, model: PreTrainedModel, factorization: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Sensitivity curves of a dense model, shared like its factors."""
    factors = _factors(bench, model, factorization, recipe, seed)
    known, name = bench.shared(recipe, seed), f"{factorization}: curves"
    if name not in known:
        rows = _calibration_rows(bench, max(1, recipe.calibration_rows // 4), seed)
        known[name] = sensitivity_curves(model, factors, lambda: mean_loss(model, rows, bench.collator))
    return known[name]


def _calibration_rows(bench: Bench, number: int, seed: int) -> datasets.Dataset:
    """Training rows drawn by `seed`; all of them where there are fewer."""
    rows = bench.splits["train"].shuffle(seed=seed)
    return rows.select(range(min(number, len(rows))))


def _ranks(model: PreTrainedModel) -> dict[str, int]:
    """Of a deployed model; a dense layer counts all its components."""
    return {t.name: getattr(t.module, "rank", min(t.shape)) for t in find_targets(model)}


def _train(trainer: Trained, checkpoint: str | None = None) -> Trained:
    trainer.remove_callback(PrinterCallback)  # the history is stored; a notebook shows one line a run
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _after_the_cut(bench: Bench, recipe: Recipe, seed: int, folder: Path, rate: float) -> dict[str, Any]:
    options = bench.trainer_options(folder, seed, recipe, rate, recipe.epochs)
    return options | {"train_dataset": _training_rows(bench, recipe, seed), "distillation": recipe.distillation}


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
