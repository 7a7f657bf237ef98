"""Early exits as methods of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from softlms.methods.base import Config, Method, Work
from softlms.methods.early_exit.exits import Exits
from softlms.methods.early_exit.module import ExitingEncoder, check_exits, put_exits
from softlms.methods.early_exit.training import first_states, train_exits
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["METHODS", "ExitsConfig"]


@dataclass(frozen=True)
class ExitsConfig(Config):
    """Settings of early exits. The model itself is not trained.

    Attributes
    ----------
    cascade, ensemble : bool
        See `softlms.methods.early_exit.exits.Exits`.
    exit_epochs : float
        Of the heads, and again of their ensembles.
    exit_batch_size : int
    exit_learning_rate : float, optional
        Of the heads; by default 0.01 for cascaded ones, 0.005 for others.
    ensemble_learning_rate : float

    Raises
    ------
    ValueError
        A setting is out of range.

    Notes
    -----
    Settings are those of the authors' code for BERT, with a weight decay of 1e-4 for cascaded heads.
    """

    cascade: bool = True
    ensemble: bool = True
    exit_epochs: float = 5
    exit_batch_size: int = 32
    exit_learning_rate: float | None = None
    ensemble_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        check_positive(exit_epochs=self.exit_epochs)
        check_at_least_one(exit_batch_size=self.exit_batch_size)
        check_positive(most=1, ensemble_learning_rate=self.ensemble_learning_rate)
        if self.exit_learning_rate is not None:
            check_positive(most=1, exit_learning_rate=self.exit_learning_rate)

    def unused(self) -> tuple[str, ...]:
        return () if self.ensemble else ("ensemble_learning_rate",)


def apply(model: PreTrainedModel, config: ExitsConfig, work: Work) -> dict[str, Any]:
    """Train heads behind the blocks of a model that stays as it is, and put them in.

    Returns
    -------
    dict
        "exit_steps"; "trained": numbers of the heads and their ensembles.

    Raises
    ------
    ValueError
        The model cannot have exits (`softlms.methods.early_exit.module.check_exits`), or the rows have no labels.
    """
    parts = check_exits(model)
    if "labels" not in work.rows.column_names:
        raise ValueError("Exits learn from labels: use softlms.encode.")
    torch.manual_seed(work.seed)
    classes, size = parts.head.weight.shape
    options = {"cascade": config.cascade, "ensemble": config.ensemble}
    exits = Exits(size, classes, parts.depth - 1, parts.dropout, **options).to(model.device)
    work.note("reading the states behind all blocks")
    states = first_states(model, parts.encoder.layer, work.rows, work.collator, work.batch_size)
    steps = train_exits(
        exits,
        states.float(),
        torch.as_tensor(list(work.rows["labels"]), device=states.device),
        epochs=config.exit_epochs,
        batch=config.exit_batch_size,
        learning_rate=config.exit_learning_rate or (0.01 if config.cascade else 0.005),
        ensemble_learning_rate=config.ensemble_learning_rate,
        weight_decay=1e-4 if config.cascade else 0.0,
        seed=work.seed,
        note=work.note,
    )
    put_exits(model, exits.to(model.dtype))
    return {"exit_steps": steps, "trained": sum(values.numel() for values in exits.parameters())}


METHODS = tuple(
    Method(f"{name}-exits", ExitsConfig, apply, (ExitingEncoder,), fixed={"cascade": cascade, "ensemble": ensemble})
    for name, cascade, ensemble in (
        ("ztw", True, True),
        ("sdn", False, False),
        ("cascade", True, False),
        ("ensemble", False, True),
    )
)
