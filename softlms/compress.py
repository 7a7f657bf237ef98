"""One call from a model's name to a compressed model on disk: the ``softlms compress`` command."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from softlms.budget import Budget, Costs, ParameterCount, count_parameters
from softlms.data.hub import weights_hash
from softlms.kernels.selective_scan import fast_scan
from softlms.lowrank.factorization import linear_targets
from softlms.measure import TimePrice, count_flops, measure_latency
from softlms.methods.base import Work
from softlms.methods.chain import run
from softlms.subjects.base import Subject
from softlms.subjects.classifier import Classifier
from softlms.subjects.language_model import LanguageModel
from softlms.subjects.settings import Compression
from softlms.utils.files import check_writable, last_checkpoint
from softlms.utils.machine import fast_bf16

__all__ = ["Compression", "compress"]

NOTE, LATENCY = "softlms_compress.json", "latency.json"  # in the work folder
SOURCES = ("data", "text")  # settings whose place in the notes is taken by what a reader understands


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
    kind = Classifier if settings.text is None else LanguageModel
    console, place = console or Console(), Path(out).resolve()
    work = place.parent / f"{place.name}.partial"
    with _alone(work) as killed:
        if _was_finished(settings, place, work, killed):
            console.print(f"{out} was finished before: removing leftover files")
        else:
            with fast_scan():
                _compress(kind(settings), place, work, console)
        _remove(work)
    return kind.load(place).eval()


def _compress(subject: Subject, out: Path, work: Path, console: Console) -> None:
    """The work of `compress`, without the lock and the cleanup."""
    settings = subject.settings
    made_from = settings.used | {"weights": weights_hash(subject.origin.location)} | subject.content
    resumed = _has_begun(work)
    if resumed:
        _check_same(work, made_from)
    if settings.bf16 and not fast_bf16():
        console.print("[yellow]This processor has no bfloat16 instructions: without --bf16 it will be far faster.")

    transformers.set_seed(settings.seed)
    model = subject.dense()
    # check the budget now, not after an hour of fine-tuning
    costs = _costs(settings, model, subject.longest, work if resumed else None)
    Budget(settings.keep, settings.count).limit(costs)
    if not resumed:
        _begin(work, made_from, costs)
    model = subject.fitted(model, work, console.print)
    scores, whole = {"dense": subject.scores(model)}, count_parameters(model)
    outcome = run(
        model,
        settings.chain,
        Work(
            **subject.teaching(model),
            collator=subject.collator,
            seed=settings.seed,
            folder=work,
            arguments=subject.arguments,
            distillation=settings.distillation,
            costs=costs,
            note=console.print,
        ),
    )
    scores["compressed"], kept = subject.scores(model), count_parameters(model)
    ranks = outcome.get("ranks", {})
    notes = settings.used | subject.data | {"source": subject.origin.source, subject.scored: scores}
    notes |= {"protocol": subject.protocol} if subject.protocol else {}
    notes |= {"kept_linear": kept.kept("linear"), "kept_total": kept.kept("total")}
    if ranks.keys() == costs.shapes.keys():
        notes |= {f"kept_{settings.count}": (costs.rest + costs.of(ranks)) / costs.dense}
    model.config.softlms = notes
    half = work / "compressed"
    shutil.rmtree(half, ignore_errors=True)  # a kill may have left it half-written
    model.save_pretrained(half)
    subject.tokenizer.save_pretrained(half)
    if out.exists():
        out.rmdir()
    half.rename(out)

    console.print(_table(subject, str(out), {"dense": whole, "compressed": kept}, scores))
    if subject.protocol:
        console.print(subject.protocol, highlight=False)
    if ranks:
        least, most = min(ranks.values()), max(ranks.values())
        console.print(f"ranks {least} to {most} over {len(ranks)} layers", highlight=False)


def _table(
    subject: Subject, title: str, sizes: Mapping[str, ParameterCount], scores: Mapping[str, Mapping[str, float]]
) -> Table:
    """Parameters and scores of the two models, and the shares kept and removed."""
    table = Table("", "linears", "total", *(f"{subject.scored} {metric}" for metric in subject.metrics), title=title)
    for name, size in sizes.items():
        values = (subject.shown(scores[name][metric]) for metric in subject.metrics)
        table.add_row(name, f"{size.linear / 1e6:.2f} M", f"{size.total / 1e6:.2f} M", *values)
    kept = [sizes["compressed"].kept(count) for count in ("linear", "total")]
    table.add_row("kept", *(f"{share:.1%}" for share in kept))
    table.add_row("removed", *(f"{1 - share:.1%}" for share in kept))
    return table


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
    known = {name: value for name, value in settings.used.items() if name not in SOURCES}
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
