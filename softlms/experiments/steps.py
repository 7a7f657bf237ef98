"""The steps of a run: train the dense model, or apply a chain of methods to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.distillation import DistillingTrainer
from softlms.evaluation.metrics import add_teacher_logits
from softlms.experiments.recipe import Recipe
from softlms.methods.base import Work
from softlms.methods.chain import Link, run
from softlms.utils.files import last_checkpoint, whole_file
from softlms.utils.machine import device

__all__ = ["Step", "apply_chain", "train_dense"]

# what a step is given first is a Bench, which imports this
Step = Callable[[Any, Recipe, int, Path, Sequence[Link]], dict[str, Any]]

SAVE_STEPS = 250  # a dense model may train for hours; training after the cut takes minutes


def train_dense(bench: Any, recipe: Recipe, seed: int, folder: Path, links: Sequence[Link]) -> dict[str, Any]:
    model = bench.new_model().to(device())
    outcome: dict[str, Any] = {"steps": 0, "history": []}
    checkpoints = folder / "trainer"
    if recipe.dense_epochs:
        args = bench.arguments(checkpoints, recipe.dense_learning_rate, recipe.dense_epochs, recipe, seed)
        args.set_save("steps", steps=SAVE_STEPS, total_limit=1)
        trainer = DistillingTrainer(model, args=args, train_dataset=bench.splits["train"], data_collator=bench.collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
        outcome = {
            "steps": trainer.state.global_step,
            "history": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
    model.save_pretrained(folder / "model")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {"scores": bench.scores(model), "ranks": _ranks(model)} | outcome | _counts(bench, model)


def apply_chain(bench: Any, recipe: Recipe, seed: int, folder: Path, links: Sequence[Link]) -> dict[str, Any]:
    model = bench.starting_model(recipe, seed)
    work = Work(
        rows=_training_rows(bench, recipe, seed) if recipe.epochs else bench.splits["train"],
        collator=bench.collator,
        seed=seed,
        folder=folder / "trainer",
        arguments=partial(bench.arguments, recipe=recipe, seed=seed),
        distillation=recipe.distillation,
        # beside the scores of the recovered model those of dev are enough
        score=lambda cut: bench.scores(cut, ("dev",) if recipe.epochs else ("dev", "test")),
        shared=bench.shared(recipe, seed),
    )
    outcome = {"untuned": {}, "ranks": {}} | run(model, recipe.chain(links), work)
    untuned = outcome["untuned"] if not recipe.epochs else {}
    return {"scores": untuned or bench.scores(model)} | outcome | _counts(bench, model)


def _training_rows(bench: Any, recipe: Recipe, seed: int) -> datasets.Dataset:
    """The training split, with the dense model's logits if the recipe distils; the logits are stored with the model."""
    rows = bench.splits["train"]
    if not recipe.distillation:
        return rows
    stored = bench.dense_folder(recipe, seed).parent / "teacher_logits.json"
    if not stored.is_file():
        taught = add_teacher_logits(rows, bench.dense_model(recipe, seed), bench.collator)
        with whole_file(stored) as partly:
            partly.write_text(json.dumps(list(taught["teacher_logits"])), "utf-8")
    return rows.add_column("teacher_logits", json.loads(stored.read_text("utf-8")))


def _ranks(model: PreTrainedModel) -> dict[str, int]:
    return {target.name: min(target.shape) for target in find_targets(model)}


def _counts(bench: Any, model: PreTrainedModel) -> dict[str, Any]:
    parameters = count_parameters(model)
    return {
        "kept_linear": parameters.kept("linear"),
        "kept_total": parameters.kept("total"),
        "parameters_linear": parameters.linear,
        "parameters_total": parameters.total,
    } | bench.extras(model)
