"""A method's name, and every setting of its run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from softlms.budget import Budget
from softlms.experiments.closure import not_in_keys
from softlms.layers import UNIT, UNITS
from softlms.losses import COMPRESSION_LOSSES
from softlms.lowrank.allocation import ALLOCATIONS
from softlms.lowrank.factorization import FACTORIZATIONS
from softlms.ranges import check_at_least_one, check_positive, check_share
from softlms.thresholds import SHARPNESS
from softlms.training import DEADLINE

__all__ = ["ABSENT", "PAPER_NAMES", "Recipe", "parse_method"]

# the paper's names of two of the pairs
PAPER_NAMES = {"static": "svd+uniform", "adaptive": "svd+soft"}
LEARNED = ("mask", "soft")
ABSENT = "absent"
_RATES = ("dense_learning_rate", "learning_rate", "static_learning_rate", "mask_learning_rate")
_DENSE = ("dense_learning_rate", "dense_epochs", "batch_size", "bf16")
_SOFT_ONLY = (
    "learning_rate", "gamma", "alpha_learning_rate", "deadline", "s", "unit", "compression_loss", "weigh_by_size",
    "further_keeps",
)  # fmt: skip


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


@not_in_keys  # what a run uses of it, by value, is
@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; epochs may be fractions.

    A setting that is added later says with ``field(..., metadata={ABSENT: value})`` at what value a run is the one that
    it was before there was the setting: then its key is the same too.

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
        See `softlms.training.SoftTrainer` and `softlms.surgery.decompose`, whose defaults these are.
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

    Raises
    ------
    ValueError
        A setting is unknown, not finite or out of range.
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
    gamma: float | None = None
    alpha_learning_rate: float | None = None
    deadline: float = DEADLINE
    s: float = SHARPNESS
    unit: str = UNIT
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
        for keep in (self.keep, *self.further_keeps):
            Budget(keep, self.count)
        if self.unit not in UNITS or self.compression_loss not in COMPRESSION_LOSSES:
            raise ValueError(
                f"unit must be one of {', '.join(UNITS)} and compression_loss one of {', '.join(COMPRESSION_LOSSES)}; "
                f"got {self.unit!r} and {self.compression_loss!r}."
            )
        numbers = dataclasses.asdict(self)
        given = {name: value for name, value in numbers.items() if value is not None}
        check_positive(**{name: given[name] for name in ("gamma", "s") if name in given})
        check_positive(
            most=1, **{name: given[name] for name in (*_RATES, "alpha_learning_rate", "deadline") if name in given}
        )
        check_positive(**{n: numbers[n] for n in ("dense_epochs", "epochs") if numbers[n] != 0})
        check_share(distillation=self.distillation)
        check_at_least_one(batch_size=self.batch_size, calibration_rows=self.calibration_rows)

    def changed(self, **changes: Any) -> Recipe:
        """A copy with other values; a TypeError for a name that is no setting."""
        return dataclasses.replace(self, **changes)

    def used(self, pair: str) -> dict[str, Any]:
        """The settings that runs of a method, named in full, depend on."""
        settings = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if ABSENT not in f.metadata or getattr(self, f.name) != f.metadata[ABSENT]
        }
        if pair == "dense":
            return {name: settings[name] for name in _DENSE if name in settings}
        unused: tuple[str, ...] = ("static_learning_rate",) if pair.endswith("+soft") else _SOFT_ONLY
        unused += () if pair.endswith("+mask") else ("mask_learning_rate",)
        # a plain SVD takes no calibration, unless its allocation does
        unused += ("calibration_rows",) if pair.startswith("svd") and not pair.endswith("+sensitivity") else ()
        return {name: value for name, value in settings.items() if name not in unused}
