"""Every setting of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from softlms.experiments.closure import not_in_keys
from softlms.methods.base import DISTILLATION, Config
from softlms.methods.chain import Link, configured
from softlms.methods.masks import MaskConfig
from softlms.methods.soft import SoftConfig
from softlms.methods.static import StaticConfig
from softlms.utils.ranges import check_at_least_one, check_positive, check_share

__all__ = ["ABSENT", "Recipe"]

ABSENT = "absent"
_DENSE = ("dense_learning_rate", "dense_epochs", "batch_size", "bf16")
_OF_METHODS = (SoftConfig, StaticConfig, MaskConfig)  # whose settings stand here by name


@not_in_keys  # the values that a run uses are in its key
@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; epochs may be fractions.

    A setting added later declares with ``field(..., metadata={ABSENT: value})`` the value at which a run is the same as
    before the setting existed; at that value its key is the same too.

    Attributes
    ----------
    dense_learning_rate, dense_epochs
        Fine-tuning of the dense model; with 0 epochs it is used as it is.
    learning_rate, static_learning_rate
        Learning rates while compressing and recovering (soft thresholds), and after the cut (all others): the best
        values differ.
    epochs
        Length of that training, the same for all, including the steps in which masks learn. 0 leaves a method
        untuned.
    batch_size : int
    distillation : float
        Share of the dense model's logits in the task loss, the same for all methods.
    keep, count
        The budget; see `softlms.budget.Budget`.
    gamma, alpha_learning_rate, deadline, s, unit, compression_loss, weigh_by_size
        See `softlms.training.SoftTrainer` and `softlms.surgery.decompose`, whose defaults these are.
    start : {"fine-tuned", "pretrained"}
        The weights that are decomposed.
    calibration_rows : int
        Training rows for data-aware factors and for gradients, and for sensitivity (which uses a quarter of them).
    mask_learning_rate : float
        Learning rate of the mask scores.
    further_keeps : tuple of float
        Smaller budgets to which a trained model with soft thresholds is also cut, without further training.
    bf16 : bool
        Train under bfloat16 autocast; parameters, thresholds and evaluation stay in float32.
    settings : mapping
        Name of a method to its own settings.

    Raises
    ------
    ValueError
        A setting is unknown, not finite or out of range.
    """

    dense_learning_rate: float = 5e-5
    dense_epochs: float = 3
    learning_rate: float = SoftConfig.learning_rate
    static_learning_rate: float = StaticConfig.static_learning_rate
    epochs: float = SoftConfig.epochs
    batch_size: int = 16
    distillation: float = DISTILLATION
    keep: float = SoftConfig.keep
    count: str = SoftConfig.count
    gamma: float | None = SoftConfig.gamma
    alpha_learning_rate: float | None = SoftConfig.alpha_learning_rate
    deadline: float = SoftConfig.deadline
    s: float = SoftConfig.s
    unit: str = SoftConfig.unit
    compression_loss: str = SoftConfig.compression_loss
    weigh_by_size: bool = SoftConfig.weigh_by_size
    start: str = "fine-tuned"
    calibration_rows: int = SoftConfig.calibration_rows
    mask_learning_rate: float = MaskConfig.mask_learning_rate
    further_keeps: tuple[float, ...] = SoftConfig.further_keeps
    bf16: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, metadata={ABSENT: {}})

    def __post_init__(self) -> None:
        if self.start not in ("fine-tuned", "pretrained"):
            raise ValueError(f"start must be 'fine-tuned' or 'pretrained', got {self.start!r}.")
        check_positive(most=1, dense_learning_rate=self.dense_learning_rate)
        if self.dense_epochs:
            check_positive(dense_epochs=self.dense_epochs)
        check_share(distillation=self.distillation)
        check_at_least_one(batch_size=self.batch_size)
        for config in _OF_METHODS:  # each checks what it reads
            given = {f.name: getattr(self, f.name) for f in fields(config) if hasattr(self, f.name)}
            config(**given if self.epochs else {n: value for n, value in given.items() if n != "epochs"})

    def changed(self, **changes: Any) -> Recipe:
        """A copy with other values; raises TypeError for an unknown setting."""
        return replace(self, **changes)

    def chain(self, links: Sequence[Link]) -> list[tuple[Link, Config]]:
        """The methods of a chain, each with its settings."""
        return configured(links, vars(self), self.settings)

    def used(self, links: Sequence[Link]) -> dict[str, Any]:
        """The settings that runs of a chain depend on; for an empty chain, those of the dense model."""
        every = {f.name for f in fields(self)}
        names = every - {f.name for config in _OF_METHODS for f in fields(config)} if links else {*_DENSE}
        for _, config in self.chain(links) if links else ():  # settings of single methods are none of the dense model's
            names |= {f.name for f in fields(config)} - set(config.unused())
        absent = {f.name for f in fields(self) if getattr(self, f.name) == f.metadata.get(ABSENT, self)}
        return {name: getattr(self, name) for name in sorted(names & every - absent)}
