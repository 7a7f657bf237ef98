"""Settings of ``softlms compress``."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any

from softlms.budget import Budget
from softlms.methods.base import DISTILLATION, Config
from softlms.methods.chain import Link, configured, parse
from softlms.methods.factors import check_factors
from softlms.methods.registry import methods
from softlms.methods.soft import SoftConfig
from softlms.model_card import plain
from softlms.utils.ranges import check_at_least_one, check_positive, check_share

__all__ = ["Compression"]

LONGEST = 10_000  # epochs
OWN = {"task": ("data", "dense_epochs", "dense_learning_rate"), "text": ("train_tokens", "test_tokens")}
MAX_LENGTH = {"task": 128, "text": 256}
WHOLE = ("calibration_rows", "batch_size", "max_length", "train_tokens", "test_tokens", "seed")  # numbers


@dataclass(frozen=True)
class Compression:
    """Settings of `softlms.compress.compress`.

    All others have the defaults of `softlms.decompose` and `softlms.SoftTrainer`.

    Attributes
    ----------
    model : str
        A fine-tuned classifier, an encoder to fine-tune first, or a causal language model: see
        `softlms.data.encoders.find_encoder`.
    task, data : str
        For a classifier; see `softlms.load_task`.
    text : str
        For a language model; see `softlms.data.text.load_text`. It learns from the training text, and is scored on the
        validation text. A folder without training text, but with the other two, is used as it is: for learning the
        validation text, for the score the test text; one line says so.
    keep, count
        See `softlms.Budget`. FLOPs and time are those of one row with the length of the longest training row.
    method : str
        A method or a chain of methods, such as "mask" or "soft+thin"; see `softlms.methods.chain.parse`.
    factors : {"svd", "fwsvd", "asvd", "whitened", "kfac"}
        For a method that takes factors, if its name does not say which; see `softlms.factorize`.
    epochs, learning_rate, alpha_learning_rate, distillation
        Of the training that compresses and recovers; for alpha's learning rate see `softlms.SoftTrainer`.
    dense_epochs, dense_learning_rate
        Of the fine-tuning, if a classifier has no head for the task yet.
    calibration_rows, seed : int
    batch_size : int
        Rows in a step.
    max_length : int
        Maximum number of tokens in a row, by default 128. For a text, the tokens of every row and of the windows in
        which perplexity is measured, by default 256.
    train_tokens, test_tokens : int, optional
        Use only the first tokens of the text that is learned from, or of the one that is scored.
    bf16 : bool
        Train under bfloat16 autocast.

    Raises
    ------
    ValueError
        A setting is unknown, not finite or out of range; there is no task and no text, or both; or a setting is of the
        other of these two.
    """

    model: str
    _: KW_ONLY
    task: str | None = None
    text: str | None = None
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
    max_length: int = None  # type: ignore[assignment]  # a number from here on
    train_tokens: int | None = None
    test_tokens: int | None = None
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, value in plain(asdict(self), "Compression").items():  # for JSON: NumPy numbers, paths
            object.__setattr__(self, name, value)
        if (self.task is None) == (self.text is None):
            given = "neither" if self.task is None else "both"
            raise ValueError(f"Give a task, for a classifier, or a text, for a language model; got {given}.")
        for field in fields(self):
            if field.name not in self.used and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect with a {self.kind}: leave it out.")
        if self.max_length is None:
            object.__setattr__(self, "max_length", MAX_LENGTH[self.kind])
        Budget(self.keep, self.count)
        check_factors(self.factors)
        check_positive(most=LONGEST, epochs=self.epochs, dense_epochs=self.dense_epochs)
        check_positive(most=1, learning_rate=self.learning_rate, dense_learning_rate=self.dense_learning_rate)
        if self.alpha_learning_rate is not None:
            check_positive(most=1, alpha_learning_rate=self.alpha_learning_rate)
        whole = {name: getattr(self, name) for name in WHOLE if getattr(self, name) is not None}
        check_at_least_one(**{name: value for name, value in whole.items() if name != "seed"})
        check_share(distillation=self.distillation)
        if not (0 <= self.seed < 2**32 and self.seed % 1 == 0):
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {self.seed!r}.")
        for name, value in whole.items():
            object.__setattr__(self, name, int(value))
        _ = self.chain

    @property
    def kind(self) -> str:
        """Which of "task" and "text" is given."""
        return "task" if self.text is None else "text"

    @property
    def used(self) -> dict[str, Any]:
        """The settings that have an effect: all but those of the other kind."""
        others = {name for kind, names in OWN.items() if kind != self.kind for name in (kind, *names)}
        return {name: value for name, value in asdict(self).items() if name not in others}

    @property
    def chain(self) -> list[tuple[Link, Config]]:
        """The methods with their settings."""
        first = methods().get(self.method.split("+")[0])
        name = f"{self.factors}+{self.method}" if first is not None and first.takes_factors else self.method
        return configured(parse(name), vars(self))
