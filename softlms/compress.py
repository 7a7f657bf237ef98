"""One call from a model's name to a compressed model on disk; the ``softlms compress`` command."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DataCollator, DataCollatorWithPadding, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from softlms.budget import Budget, count_parameters, parameter_costs
from softlms.calibration import calibrate
from softlms.evaluation import add_teacher_logits, evaluate
from softlms.factorize import FACTORIZATIONS, linear_targets
from softlms.precision import fast_bf16
from softlms.surgery import decompose, deploy, ranks
from softlms.tasks import TaskData, encode, load_task
from softlms.training import DistillingTrainer, SoftTrainer
from softlms.zoo import find_encoder, load_classifier

__all__ = ["Compression", "compress"]

# unit and sharpness of the thresholds, as in the table of notebook 05: sigma of data-aware factors fall so steeply that
# their largest says nothing
THRESHOLDS: dict[str, dict[str, Any]] = {"svd": {"unit": "max", "s": 50.0}}
DATA_AWARE: dict[str, Any] = {"unit": "mean", "s": 12.5}
# weight of the compression loss: at SVD's, thresholds of data-aware factors do not hear the task
GAMMA, DATA_AWARE_GAMMA = 0.1, 0.03
DEADLINE = 0.6


@dataclass(frozen=True)
class Compression:
    """Settings of `compress`; the defaults are those of README's table, stretched to three epochs.

    Attributes
    ----------
    model : str
        A fine-tuned classifier, or an encoder that is fine-tuned first: folder, hub name, or "minilm".
    task, data : str
        See `softlms.load_task`.
    keep, count
        See `softlms.Budget`.
    factors : {"svd", "fwsvd", "asvd", "whitened"}
        See `softlms.decompose`.
    epochs, learning_rate, alpha_learning_rate, distillation
        Of the training that compresses and recovers.
    dense_epochs, dense_learning_rate
        Of the fine-tuning, where the model has no head for the task yet.
    calibration_rows, batch_size, max_length, seed : int
    bf16 : bool
        Train under bfloat16 autocast.
    """

    model: str
    task: str
    keep: float
    data: str = "hub"
    count: str = "linear"
    factors: str = "whitened"
    epochs: float = 3
    learning_rate: float = 5e-5
    alpha_learning_rate: float = 1e-2
    distillation: float = 0.9
    dense_epochs: float = 3
    dense_learning_rate: float = 5e-5
    calibration_rows: int = 256
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        Budget(self.keep, self.count)
        if self.factors not in FACTORIZATIONS:
            raise ValueError(f"Unknown factorization {self.factors!r}; known: {', '.join(FACTORIZATIONS)}.")
        for name in ("epochs", "learning_rate", "alpha_learning_rate", "dense_epochs", "dense_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}.")
        for name in ("calibration_rows", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation is a share, 0 to 1; got {self.distillation!r}.")


def compress(settings: Compression, out: str | Path, *, console: Console | None = None) -> PreTrainedModel:
    """Fine-tune if need be, decompose, learn ranks, recover, deploy, and save.

    Parameters
    ----------
    settings : Compression
    out : str or Path
        Folder for the compressed model and its tokenizer: ``from_pretrained`` loads it after ``import softlms``. Beside
        it ``OUT.partial`` holds checkpoints of each epoch while the work lasts: the same call continues from there
        after an interruption.
    console : rich.console.Console, optional
        Where steps and the table of results go.

    Returns
    -------
    PreTrainedModel
        The deployed model.

    Raises
    ------
    ValueError, FileNotFoundError, FileExistsError
        Wrong settings, model, data or output folder, or an interrupted run with other settings: before any work.
    """
    console, out = console or Console(), Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds something already: choose another folder, or remove it.")
    data = load_task(settings.task, settings.data)
    encoder = find_encoder(settings.model)
    tokenizer = encoder.tokenizer()
    rows, collator = encode(data, tokenizer, settings.max_length), DataCollatorWithPadding(tokenizer)

    if settings.bf16 and not fast_bf16():
        console.print("[yellow]This processor has no bfloat16 instructions: without --bf16 it will be far faster.")

    work = _work_folder(settings, out)
    transformers.set_seed(settings.seed)
    location = work / "dense" if (work / "dense").is_dir() else encoder.location
    dense, report = load_classifier(
        location, num_labels=data.task.num_labels, dtype=torch.float32, output_loading_info=True
    )
    # the budget is checked here and now: it would be a pity after an hour of fine-tuning
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linear_targets(dense).items()}
    Budget(settings.keep, settings.count).limit(parameter_costs(shapes, count_parameters(dense).rest, settings.count))
    if location == encoder.location and not report["missing_keys"]:
        _check_head(settings, dense, data, rows["dev"], collator)
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(_as_text(settings), "utf-8")
    if report["missing_keys"]:
        console.print(f"{encoder.source} has no head for {settings.task}: fine-tuning first")
        args = _arguments(settings, work / "fine-tuning", settings.dense_learning_rate, settings.dense_epochs)
        _train(DistillingTrainer(dense, args=args, train_dataset=rows["train"], data_collator=collator))
        dense.save_pretrained(work / "dense.saving")
        (work / "dense.saving").rename(work / "dense")
    scores = {"dense": evaluate(dense, data.task, rows["dev"], collator)}
    whole = count_parameters(dense)

    console.print(f"decomposing with {settings.factors} factors")
    train = rows["train"]
    if settings.distillation:
        train = add_teacher_logits(train, dense, collator)
    statistics = None
    if settings.factors != "svd":
        sample = train.shuffle(seed=settings.seed)
        number = min(settings.calibration_rows, len(sample))
        statistics = calibrate(dense, sample, collator, rows=number, fisher=settings.factors == "fwsvd")
    model = decompose(dense, settings.factors, statistics, **THRESHOLDS.get(settings.factors, DATA_AWARE))
    console.print(f"learning ranks, to keep {settings.keep:.0%} of {settings.count}")
    trainer = SoftTrainer(
        model,
        keep=settings.keep,
        count=settings.count,
        gamma=GAMMA if settings.factors == "svd" else DATA_AWARE_GAMMA,
        alpha_learning_rate=settings.alpha_learning_rate,
        deadline=DEADLINE,
        distillation=settings.distillation,
        args=_arguments(settings, work / "compressing", settings.learning_rate, settings.epochs),
        train_dataset=train,
        data_collator=collator,
    )
    _train(trainer)
    learned = ranks(model)
    deploy(model)
    scores["compressed"] = evaluate(model, data.task, rows["dev"], collator)
    kept = count_parameters(model)
    notes = asdict(settings) | {"source": encoder.source, "data": data.source, "dev": scores}
    notes |= {"kept_linear": kept.kept("linear"), "kept_total": kept.kept("total")}
    model.config.softlms = notes
    model.save_pretrained(work / "compressed")
    tokenizer.save_pretrained(work / "compressed")
    if out.exists():
        out.rmdir()
    (work / "compressed").rename(out)
    shutil.rmtree(work)

    table = Table("", "linears", "total", *(f"dev {metric}" for metric in data.task.metrics), title=str(out))
    for name, counted in (("dense", whole), ("compressed", kept)):
        values = (f"{100 * scores[name][metric]:.1f}" for metric in data.task.metrics)
        table.add_row(name, f"{counted.linear / 1e6:.2f} M", f"{counted.total / 1e6:.2f} M", *values)
    console.print(table)
    console.print(
        f"ranks {min(learned.values())} to {max(learned.values())} over {len(learned)} layers", highlight=False
    )
    return model.eval()


def _check_head(
    settings: Compression, model: PreTrainedModel, data: TaskData, dev: datasets.Dataset, collator: DataCollator
) -> None:
    """A head of another task may have the right shape too, and would teach nonsense."""
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


def _work_folder(settings: Compression, out: Path) -> Path:
    """Where the work is kept while it lasts; an error if an earlier run with other settings is there."""
    work = out.with_name(f"{out.name}.partial")
    note = work / "settings.json"
    if work.exists() and not note.is_file():
        raise FileExistsError(f"{work} is needed for the work in between, and holds something else: move it away.")
    if note.is_file() and note.read_text("utf-8") != _as_text(settings):
        raise FileExistsError(f"{work} is from a run with other settings: give those, or remove it.")
    return work


def _as_text(settings: Compression) -> str:
    return json.dumps(asdict(settings), indent=1)


def _arguments(settings: Compression, folder: Path, rate: float, epochs: float) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.batch_size,
        weight_decay=0.01,
        warmup_steps=0.06,
        seed=settings.seed,
        bf16=settings.bf16,
        train_sampling_strategy="group_by_length",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _train(trainer: DistillingTrainer) -> None:
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
