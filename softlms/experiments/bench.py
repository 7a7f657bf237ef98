"""The runs behind the figures, stored so that none is done twice.

A run is one method at one seed. Its folder under ``runs/`` is named by a key of everything it depends on: recipe,
encoder, sentences, the library's code and versions. It is written under a temporary name and renamed when complete.
So a killed batch continues with the first missing run, and a dense model's training at its last checkpoint. One
process at a time makes a run; others that need it wait and then load it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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

from softlms.architectures import find_targets
from softlms.data.encoders import Encoder, load_classifier
from softlms.data.hub import pretrained, weights_hash
from softlms.data.tasks import TaskData, encode
from softlms.evaluation.metrics import evaluate
from softlms.experiments.closure import code_behind, not_in_keys
from softlms.experiments.jobs import Job, available_processes, run_jobs, tell_stored
from softlms.experiments.provenance import commit
from softlms.experiments.recipe import Recipe
from softlms.experiments.steps import Step, apply_chain, train_dense
from softlms.experiments.store import DEPENDS, Run, key, why_missing
from softlms.kernels.selective_scan import fast_scan
from softlms.methods.base import training_arguments
from softlms.methods.chain import Link, full_name, parse
from softlms.utils.files import lock
from softlms.utils.machine import device, hardware, use_threads, versions

__all__ = ["Bench"]


@dataclass(eq=False)  # compared by identity
class Bench:
    """An encoder, a task and a folder: makes runs and finds stored ones.

    Parameters
    ----------
    encoder : Encoder
    data : TaskData
    folder : Path
        Holds a subfolder for each run.
    max_length : int
        Maximum tokens per row.
    train_rows : int, optional
        Use only the first rows of the training split.
    threads : int
        Of a run, so that its numbers depend neither on the number of free cores nor on other runs at the same time.
    """

    encoder: Encoder
    data: TaskData
    folder: Path
    max_length: int = 128
    train_rows: int | None = None
    threads: int = 1
    note: Callable[[str], None] = field(default=print, repr=False)
    _shared_of: tuple[Any, ...] = field(default=(), init=False, repr=False)
    _shared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @not_in_keys
    def __getstate__(self) -> dict[str, Any]:
        """Only what defines the bench goes to another process: a note may be anything, and derived values are large."""
        kept = {k: v for k, v in self.__dict__.items() if not isinstance(getattr(type(self), k, None), cached_property)}
        return kept | {"note": print, "_shared_of": (), "_shared": {}}

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
        """The model that is factored, without memory for its weights."""
        with torch.device("meta"):
            return self.prepare(self.untrained_model())

    def untrained_model(self) -> PreTrainedModel:
        """A dense model with arbitrary weights, for whatever depends on shapes alone."""
        # torch counts no FLOPs for its fused attention on a CPU
        config = pretrained(AutoConfig, self.encoder.location, attn_implementation="eager")
        return AutoModelForSequenceClassification.from_config(config)

    @cached_property
    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.encoder.tokenizer())

    @not_in_keys
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

    @not_in_keys
    def run(self, method: str, recipe: Recipe, seed: int) -> Run:
        """Do a run, or load it if it is stored.

        Parameters
        ----------
        method : str
            "dense", or a chain of methods; see `softlms.methods.chain.parse`.
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
        chain, folder = self._place(method, recipe, seed)
        if _needs_dense(chain, recipe):
            self.run("dense", recipe, seed)  # first, so that its time does not count here
        with lock(folder):
            return self.stored(method, recipe, seed) or self._run(chain, folder, method, recipe, seed)

    @not_in_keys
    def _run(self, chain: str, folder: Path, method: str, recipe: Recipe, seed: int) -> Run:
        partial = folder.with_name(f"{folder.name}.partial")  # left by a killed process: continued
        partial.mkdir(exist_ok=True)
        started = time.monotonic()
        result = self._make(_step(chain), recipe, seed, partial, _links(chain)) | {
            "seconds": round(time.monotonic() - started, 1),
            "hardware": hardware(self.threads),
            "versions": versions(),
            "commit": commit(),
            "encoder": self.encoder.source,
            "data": self.data.source,
        }
        (partial / DEPENDS).write_text(json.dumps(self._depends(chain, recipe, seed), indent=1), "utf-8")
        (partial / "result.json").write_text(json.dumps(result, indent=1), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a folder without result.json is no run
        partial.rename(folder)
        return Run(result | {"method": method}, folder / "model" if chain == "dense" else None)

    def _make(self, step: Step, recipe: Recipe, seed: int, folder: Path, links: Sequence[Link]) -> dict[str, Any]:
        transformers.set_seed(seed)
        with use_threads(self.threads), fast_scan():
            return {"seed": seed} | step(self, recipe, seed, folder, links)

    @not_in_keys
    def stored(self, method: str, recipe: Recipe, seed: int) -> Run | None:
        """A stored run, as `run` returns it, or None."""
        chain, folder = self._place(method, recipe, seed)
        if not (folder / "result.json").is_file():
            return None
        result = json.loads((folder / "result.json").read_text("utf-8"))
        return Run(result | {"method": method}, folder / "model" if chain == "dense" else None)

    @not_in_keys
    def _place(self, method: str, recipe: Recipe, seed: int) -> tuple[str, Path]:
        """A method's full name, and the folder of its run."""
        chain = "dense" if method == "dense" else full_name(method)
        return chain, self.folder / f"{chain}-{seed}-{key(self._depends(chain, recipe, seed))}"

    @not_in_keys
    def folder_of(self, method: str, recipe: Recipe, seed: int) -> Path:
        """The folder of a run, whether it is stored or not."""
        return self._place(method, recipe, seed)[1]

    @not_in_keys
    def why_missing(self, method: str, recipe: Recipe, seed: int) -> str:
        """Why a run is not stored; see `softlms.experiments.store.why_missing`."""
        chain, folder = self._place(method, recipe, seed)
        return why_missing(self.folder, folder.name.rsplit("-", 1)[0], self._depends(chain, recipe, seed))

    @not_in_keys
    def runs(self, methods: tuple[str, ...], recipe: Recipe, seeds: tuple[int, ...]) -> list[Run]:
        """All methods at all seeds, in that order; seeds in parallel, with a progress line for each run."""
        started, total = time.monotonic(), len(methods) * len(seeds)
        units = [[Job(self, method, recipe, seed) for method in methods] for seed in seeds]
        runs, metric = {}, self.data.task.metrics[0]
        for line in tell_stored(job for unit in units for job in unit):
            self.note(line)
        for done, (job, run) in enumerate(run_jobs(units, available_processes(self.threads)), 1):
            left = (time.monotonic() - started) / done * (total - done)
            self.note(
                f"{done:>3} of {total}: {job.method:<8} seed {job.seed}, "
                f"dev {metric} {run.result['scores']['dev'][metric]:.3f}, "
                f"{run.result['kept_linear']:.3f} of the linears; about {left / 60:.0f} min left"
            )
            runs[job.method, job.seed] = run
        return [runs[method, seed] for seed in seeds for method in methods]

    def new_model(self) -> PreTrainedModel:
        """The model before dense training; torch's seed decides how new weights are initialized."""
        return self.encoder.for_task(self.data.task)

    def load_model(self, folder: Path) -> PreTrainedModel:
        """A dense model saved by its run."""
        return load_classifier(folder)

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """What happens to a dense model before it is factored: nothing here."""
        return model

    def extras(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a run's result holds besides scores and counts: nothing here."""
        return {}

    def dense_model(self, recipe: Recipe, seed: int) -> PreTrainedModel:
        """The dense model of `seed`, trained now if it is not stored, on the device used for training."""
        return self.load_model(self.dense_folder(recipe, seed)).to(device())

    @not_in_keys
    def dense_folder(self, recipe: Recipe, seed: int) -> Path:
        """The folder of the dense model of `seed`, trained now if it is not stored."""
        folder = self.run("dense", recipe, seed).model
        assert folder is not None  # dense runs keep their model
        return folder

    @not_in_keys
    def shared(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """What the methods of one model share in memory, such as factors; emptied when the model changes."""
        model = (key(self._depends("dense", recipe, seed)), recipe.start, recipe.calibration_rows)
        if self._shared_of != model:
            self._shared_of = model
            self._shared.clear()
        return self._shared

    def starting_model(self, recipe: Recipe, seed: int) -> PreTrainedModel:
        """The model that every method cuts: the fine-tuned dense one, or the pretrained encoder with a new head."""
        if recipe.start == "fine-tuned":
            return self.prepare(self.dense_model(recipe, seed))
        transformers.set_seed(seed)
        return self.prepare(self.new_model().to(device()))

    def scores(self, model: PreTrainedModel, splits: tuple[str, ...] | None = None) -> dict[str, dict[str, float]]:
        """Metrics on those splits that the task has; on everything that the bench scores if they are not given."""
        present = {split: self.splits[split] for split in splits or ("dev", "test") if split in self.splits}
        return {split: evaluate(model, self.data.task, rows, self.collator) for split, rows in present.items()}

    def arguments(
        self, folder: Path, learning_rate: float, epochs: float, recipe: Recipe, seed: int
    ) -> TrainingArguments:
        """Training arguments common to all trainings of a run."""
        return training_arguments(
            folder,
            learning_rate,
            epochs,
            batch_size=recipe.batch_size,
            seed=seed,
            bf16=recipe.bf16,
            logging_steps=10,
            save_strategy="no",
            disable_tqdm=True,
            log_level="error",
        )

    @not_in_keys
    def _depends(self, chain: str, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Everything that a run's numbers depend on."""
        links = _links(chain)
        starts: list[Any] = [_step(chain), type(self)]
        starts += [part for link in links for part in (link.method.apply, link.method.config)]
        dense = {"dense": self._place("dense", recipe, seed)[1].name} if _needs_dense(chain, recipe) else {}
        return (
            self._inputs(chain)
            | {f"fixed.{number} {link.name}": dict(link.said) for number, link in enumerate(links)}
            | {f"recipe.{name}": value for name, value in recipe.used(links).items()}
            | {"code": code_behind(*starts), "seed": seed, "versions": versions(), "hardware": hardware(self.threads)}
            | dense
        )


def _links(chain: str) -> list[Link]:
    return [] if chain == "dense" else parse(chain)


def _step(chain: str) -> Step:
    return train_dense if chain == "dense" else apply_chain


def _needs_dense(chain: str, recipe: Recipe) -> bool:
    return chain != "dense" and (recipe.start == "fine-tuned" or recipe.distillation > 0)
