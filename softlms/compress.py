"""One call from a model's name to a compressed model on disk: the ``softlms compress`` command."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from transformers import DataCollator, DataCollatorWithPadding, PreTrainedModel, TrainingArguments

from softlms.budget import Budget, Costs, count_parameters
from softlms.data.encoders import Encoder, find_encoder, load_classifier
from softlms.data.hub import weights_hash
from softlms.data.tasks import TaskData, encode, load_task
from softlms.distillation import DistillingTrainer
from softlms.evaluation import add_teacher_logits, evaluate
from softlms.files import check_writable, last_checkpoint
from softlms.lowrank.factorization import linear_targets
from softlms.machine import device, fast_bf16
from softlms.measure import TimePrice, count_flops, measure_latency
from softlms.methods.base import DISTILLATION, Config, Work, training_arguments
from softlms.methods.chain import Link, configured, parse, run
from softlms.methods.factors import check_factors
from softlms.methods.registry import methods
from softlms.methods.soft import SoftConfig
from softlms.model_card import plain
from softlms.ranges import check_at_least_one, check_positive, check_share

__all__ = ["Compression", "compress"]

LONGEST = 10_000  # epochs
NOTE, LATENCY = "softlms_compress.json", "latency.json"  # in the work folder


@dataclass(frozen=True)
class Compression:
    """Settings of `compress`. All others have the defaults of `softlms.decompose` and `softlms.SoftTrainer`.

    Attributes
    ----------
    model : str
        A fine-tuned classifier, or an encoder to fine-tune first: folder, hub name, or "minilm".
    task, data : str
        See `softlms.load_task`.
    keep, count
        See `softlms.Budget`. FLOPs and time are those of one row with the length of the longest training row.
    method : str
        A method or a chain of methods, such as "mask" or "soft+thin"; see `softlms.methods.chain.parse`.
    factors : {"svd", "fwsvd", "asvd", "whitened"}
        For a method that takes factors, if its name does not say which; see `softlms.factorize`.
    epochs, learning_rate, alpha_learning_rate, distillation
        Of the training that compresses and recovers; for alpha's learning rate see `softlms.SoftTrainer`.
    dense_epochs, dense_learning_rate
        Of the fine-tuning, if the model has no head for the task yet.
    calibration_rows, batch_size, max_length, seed : int
    bf16 : bool
        Train under bfloat16 autocast.

    Raises
    ------
    ValueError
        A setting is unknown, not finite or out of range.
    """

    model: str
    task: str
    keep: float
    data: str = "hub"
    count: str = SoftConfig.count
    method: str = "soft"
    factors: str = SoftConfig.factors
    epochs: float = SoftConfig.epochs
    learning_rate: float = SoftConfig.learning_rate
    alpha_learning_rate: float | None = SoftConfig.alpha_learning_rate
    distillation: float = DISTILLATION
    dense_epochs: float = 3
    dense_learning_rate: float = 5e-5
    calibration_rows: int = SoftConfig.calibration_rows
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, value in plain(asdict(self), "Compression").items():  # for JSON: NumPy numbers, paths
            object.__setattr__(self, name, value)
        Budget(self.keep, self.count)
        check_factors(self.factors)
        check_positive(most=LONGEST, epochs=self.epochs, dense_epochs=self.dense_epochs)
        check_positive(most=1, learning_rate=self.learning_rate, dense_learning_rate=self.dense_learning_rate)
        if self.alpha_learning_rate is not None:
            check_positive(most=1, alpha_learning_rate=self.alpha_learning_rate)
        check_at_least_one(
            calibration_rows=self.calibration_rows, batch_size=self.batch_size, max_length=self.max_length
        )
        check_share(distillation=self.distillation)
        if not (0 <= self.seed < 2**32 and self.seed % 1 == 0):
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {self.seed!r}.")
        for name in ("calibration_rows", "batch_size", "max_length", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        _ = self.chain

    @property
    def chain(self) -> list[tuple[Link, Config]]:
        """The methods with their settings."""
        first = methods().get(self.method.split("+")[0])
        name = f"{self.factors}+{self.method}" if first is not None and first.takes_factors else self.method
        return configured(parse(name), vars(self))


def compress(settings: Compression, out: str | Path, *, console: Console | None = None) -> PreTrainedModel:
    """Fine-tune if needed, decompose, learn ranks, recover, deploy, and save.

    Parameters
    ----------
    settings : Compression
    out : str or Path
        Folder for the compressed model and its tokenizer; ``from_pretrained`` loads it after ``import softlms``. While
        the run lasts, ``OUT.partial`` beside it stores a checkpoint of each epoch. After any interruption, the same
        call continues from there and ends with the same model.
    console : rich.console.Console, optional
        Prints the steps and the table of results.

    Returns
    -------
    PreTrainedModel
        The deployed model, as saved in `out`.

    Raises
    ------
    ValueError, OSError
        Wrong settings, model, data or output folder, another run active there, or an interrupted run with other
        settings. Raised before any work; nothing is left behind.
    RuntimeError
        Training diverged. Its checkpoints are kept.
    """
    console, place = console or Console(), Path(out).resolve()
    work = place.parent / f"{place.name}.partial"
    with _alone(work) as killed:
        if _was_finished(settings, place, work, killed):
            console.print(f"{out} was finished before: removing leftover files")
        else:
            _compress(settings, place, work, console)
        _remove(work)
    return load_classifier(place).eval()


def _compress(settings: Compression, out: Path, work: Path, console: Console) -> None:
    """The work of `compress`, without the lock and the cleanup."""
    data = load_task(settings.task, settings.data)
    encoder = find_encoder(settings.model)
    made_from = asdict(settings) | {"weights": weights_hash(encoder.location), "sentences": _hash(data)}
    resumed = _has_begun(work)
    if resumed:
        _check_same(work, made_from)
    tokenizer = encoder.tokenizer()
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer of {encoder.source} has no padding token: set one, and save it again.")
    rows, collator = encode(data, tokenizer, settings.max_length), DataCollatorWithPadding(tokenizer)

    if settings.bf16 and not fast_bf16():
        console.print("[yellow]This processor has no bfloat16 instructions: without --bf16 it will be far faster.")

    transformers.set_seed(settings.seed)
    dense, has_head = encoder.with_head(data.task)
    dense.to(device())  # where the Trainer will put it: keep all other work as fast
    _check_rows(dense, rows)
    if dense.config.pad_token_id is None:  # sequence classifiers on language models need it
        dense.config.pad_token_id = tokenizer.pad_token_id
    # check the budget now, not after an hour of fine-tuning
    costs = _costs(settings, dense, max(rows["train"]["length"]), work if resumed else None)
    Budget(settings.keep, settings.count).limit(costs)
    if has_head:
        _check_head(settings, dense, data, rows["dev"], collator)
    if not resumed:
        _begin(work, made_from, costs)
    if not has_head:
        dense = _fine_tuned(settings, dense, encoder, rows["train"], collator, work, console)
    scores = {"dense": evaluate(dense, data.task, rows["dev"], collator)}
    whole = count_parameters(dense)

    train = rows["train"]
    if settings.distillation:
        train = add_teacher_logits(train, dense, collator)
    model = dense
    outcome = run(
        model,
        settings.chain,
        Work(
            rows=train,
            collator=collator,
            seed=settings.seed,
            folder=work,
            arguments=partial(_arguments, settings),
            distillation=settings.distillation,
            costs=costs,
            note=console.print,
        ),
    )
    scores["compressed"] = evaluate(model, data.task, rows["dev"], collator)
    kept = count_parameters(model)
    notes = asdict(settings) | {"source": encoder.source, "data": data.source, "dev": scores}
    notes |= {"kept_linear": kept.kept("linear"), "kept_total": kept.kept("total")}
    learned = outcome.get("ranks", {})
    if learned.keys() == costs.shapes.keys():
        notes |= {f"kept_{settings.count}": (costs.rest + costs.of(learned)) / costs.dense}
    model.config.softlms = notes
    _write(work / "compressed", model, tokenizer)
    if out.exists():
        out.rmdir()
    (work / "compressed").rename(out)

    table = Table("", "linears", "total", *(f"dev {metric}" for metric in data.task.metrics), title=str(out))
    for name, counted in (("dense", whole), ("compressed", kept)):
        values = (f"{100 * scores[name][metric]:.1f}" for metric in data.task.metrics)
        table.add_row(name, f"{counted.linear / 1e6:.2f} M", f"{counted.total / 1e6:.2f} M", *values)
    console.print(table)
    if learned:
        least, most = min(learned.values()), max(learned.values())
        console.print(f"ranks {least} to {most} over {len(learned)} layers", highlight=False)


def _fine_tuned(
    settings: Compression,
    model: PreTrainedModel,
    encoder: Encoder,
    train: datasets.Dataset,
    collator: DataCollator,
    work: Path,
    console: Console,
) -> PreTrainedModel:
    """The model with a head for the task, always loaded from its folder, whether trained now or before."""
    folder = work / "dense"
    if not folder.is_dir():
        console.print(f"{encoder.source} has no head for {settings.task}: fine-tuning a new one first")
        args = _arguments(settings, work / "fine-tuning", settings.dense_learning_rate, settings.dense_epochs)
        trainer = DistillingTrainer(model, args=args, train_dataset=train, data_collator=collator)
        trainer.train(resume_from_checkpoint=last_checkpoint(work / "fine-tuning"))
        if not all(values.isfinite().all() for values in model.parameters()):
            raise RuntimeError("Fine-tuning diverged: lower dense_learning_rate.")
        _write(work / "dense.saving", model)
        (work / "dense.saving").rename(folder)
    dense = load_classifier(folder, dtype=torch.float32).to(device())
    dense.config.name_or_path = encoder.location  # that folder is temporary: the model card names the source
    return dense


def _costs(settings: Compression, model: PreTrainedModel, tokens: int, begun: Path | None) -> Costs:
    """Costs of the dense model. Time is the one measured when the work began."""
    targets = linear_targets(model)  # rejects what cannot be factored
    if settings.count == "flops":
        return count_flops(model, tokens=tokens)
    if settings.count == "latency":
        return measure_latency(model, tokens=tokens) if begun is None else _read_latency(begun / LATENCY)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in targets.items()}
    return Budget(settings.keep, settings.count).costs(shapes, count_parameters(model))


def _read_latency(file: Path) -> Costs:
    stored = json.loads(file.read_text(encoding="utf-8"))
    prices = {
        name: TimePrice(**price | {"ranks": tuple(price["ranks"]), "thin": tuple(price["thin"])})
        for name, price in stored["prices"].items()
    }
    return Costs("latency", {name: (price.m, price.n) for name, price in prices.items()}, prices, stored["rest"])


def _write_latency(file: Path, costs: Costs) -> None:
    prices = {name: asdict(price) for name, price in costs.prices.items() if isinstance(price, TimePrice)}
    file.write_text(json.dumps({"rest": costs.rest, "prices": prices}), encoding="utf-8")


def _check_rows(model: PreTrainedModel, rows: Mapping[str, datasets.Dataset]) -> None:
    """Rows longer than the model reads, or unknown tokens, would stop training in the middle."""
    used = [rows["train"], rows["dev"]]
    longest = max(max(split["length"]) for split in used)
    positions = getattr(model.config, "max_position_embeddings", longest)  # a state space model has no limit
    if longest > positions:
        raise ValueError(f"Rows are up to {longest} tokens long, and the model reads {positions}: lower max_length.")
    largest = max(max(ids) for split in used for ids in split["input_ids"])
    known = model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise ValueError(f"The tokenizer returns token {largest}, the model has {known}: use the model's tokenizer.")


def _check_head(
    settings: Compression, model: PreTrainedModel, data: TaskData, dev: datasets.Dataset, collator: DataCollator
) -> None:
    """A head of another task may have the right shape, and would be a bad teacher."""
    if "accuracy" not in data.task.metrics:
        return
    accuracy = evaluate(model, data.task, dev, collator)["accuracy"]
    commonest = max(Counter(dev["labels"]).values()) / len(dev)
    if accuracy < commonest - 0.02:
        raise ValueError(
            f"{settings.model} has a head, but is right on {accuracy:.1%} of {settings.task}'s dev rows, and the "
            f"commonest answer alone is on {commonest:.1%}. Is it fine-tuned for another task? Give the encoder "
            "without its head."
        )


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[bool]:
    """Lock the work folder. A run that ends before any training leaves nothing behind.

    Yields whether the previous run was killed, and so left its lock.
    """
    new = [folder for folder in work.parents if not folder.exists()]
    check_writable([work.parent])
    place = work.with_name(f"{work.name}.lock")
    killed, lock = place.exists(), FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"Another run is at work in {work}: wait for it, or choose another folder.") from None
    try:
        yield killed
    finally:
        if (work / NOTE).is_file() and not _has_begun(work):
            _remove(work)
        with contextlib.suppress(OSError):  # Windows cannot remove an open file; filelock does it there
            place.unlink()
        lock.release()
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _was_finished(settings: Compression, out: Path, work: Path, killed: bool) -> bool:
    """Whether a run with these settings was killed between its last step and the end of the cleanup.

    Raises
    ------
    FileExistsError
        `out` or `work` contains something else.
    """
    if work.exists() and not (work / NOTE).is_file() and (work.is_file() or any(work.iterdir())):
        raise FileExistsError(f"{work} is needed for intermediate files, and contains something else: move it away.")
    if out.is_mount():
        raise FileExistsError(f"{out} is a mount point and cannot be replaced: choose a folder in it.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    notes = _read(out / "config.json").get("softlms", {})
    known = {name: value for name, value in asdict(settings).items() if name != "data"}  # stored under another name
    if (killed or work.is_dir()) and all(notes.get(name) == value for name, value in known.items()):
        return True
    raise FileExistsError(f"{out} already contains something: choose another folder, or remove it.")


def _has_begun(work: Path) -> bool:
    """Whether the folder contains results that took time."""
    return (work / "dense").is_dir() or any(
        last_checkpoint(place) for place in {p.parent for p in work.rglob("checkpoint-*")}
    )


def _check_same(work: Path, made_from: Mapping[str, Any]) -> None:
    """Raise if the folder is of an earlier run with other settings or from other files."""
    before = _read(work / NOTE)
    changed = [
        f"{name} {before.get(name)}, not {value}" if name in Compression.__annotations__ else name
        for name, value in made_from.items()
        if before.get(name) != value
    ]
    if changed:
        raise FileExistsError(
            f"{work} is from a run with other settings ({', '.join(changed)}): give those, or remove it."
        )


def _begin(work: Path, made_from: Mapping[str, Any], costs: Costs) -> None:
    _remove(work)
    work.mkdir()
    # first: this file marks the folder as ours
    (work / NOTE).write_text(json.dumps(made_from, indent=1), encoding="utf-8")
    if costs.count == "latency":
        _write_latency(work / LATENCY, costs)


def _remove(work: Path) -> None:
    """Remove the note last, so that leftovers of a kill are still recognized as ours."""
    if not work.is_dir():
        return
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != NOTE:
            path.unlink()
    shutil.rmtree(work)


def _read(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or truncated."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _hash(data: TaskData) -> str:
    content = json.dumps({split: rows.to_dict() for split, rows in data.splits.items()})
    return hashlib.sha256(content.encode()).hexdigest()


def _write(folder: Path, *parts: Any) -> None:
    """Save a model and its tokenizer; replace what a kill may have left half-written."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in parts:
        part.save_pretrained(folder)


def _arguments(settings: Compression, folder: Path, learning_rate: float, epochs: float) -> TrainingArguments:
    return training_arguments(
        folder,
        learning_rate,
        epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        bf16=settings.bf16,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
    )
