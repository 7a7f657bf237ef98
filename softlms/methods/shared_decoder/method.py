"""Stored linears as methods of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from softlms.lowrank.calibration import calibrate
from softlms.methods.base import Config, Method, Work
from softlms.methods.factors import calibration_sample
from softlms.methods.shared_decoder.autoencoder import COSINE, EPOCHS, SharedDecoder
from softlms.methods.shared_decoder.module import CODECS, StoredLinear
from softlms.methods.shared_decoder.surgery import store_linears, stored_bytes
from softlms.utils.ranges import check_at_least_one, check_positive, check_share

__all__ = ["METHODS", "StoredConfig"]


@dataclass(frozen=True)
class StoredConfig(Config):
    """Settings of stored linears.

    Attributes
    ----------
    codec, times, together
        See `softlms.methods.shared_decoder.surgery.store_linears`.
    cosine, fit_epochs
        Of the shared decoder: see `softlms.methods.shared_decoder.autoencoder.SharedDecoder`.
    calibration_rows : int
        Training rows for "whitened-svd".

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    codec: str = "shared-decoder"
    times: float = 5.0
    together: bool = True
    cosine: float = COSINE
    fit_epochs: float = EPOCHS
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {self.codec!r}.")
        check_positive(times=self.times, fit_epochs=self.fit_epochs)
        check_share(cosine=self.cosine)
        check_at_least_one(calibration_rows=self.calibration_rows)

    def unused(self) -> tuple[str, ...]:
        learned = () if self.codec == SharedDecoder.name else ("cosine", "fit_epochs")
        return learned if CODECS[self.codec].needs_inputs else (*learned, "calibration_rows")


def apply(model: PreTrainedModel, config: StoredConfig, work: Work) -> dict[str, Any]:
    """Store a model's linears, without any training of the model.

    Returns
    -------
    dict
        "untuned", and "bytes" of all that was stored of the linears' weights.
    """
    kind = CODECS[config.codec]
    codec = SharedDecoder(config.cosine, config.fit_epochs, work.note) if kind is SharedDecoder else kind()
    statistics = None
    if codec.needs_inputs:
        rows = calibration_sample(work, config.calibration_rows)
        statistics = calibrate(model, rows, work.collator, rows=len(rows))
    store_linears(
        model,
        config.times,
        codec,
        together=config.together,
        statistics=statistics,
        seed=work.seed,
        note=work.note,
    )
    return {"untuned": work.scores(lambda: model), "bytes": stored_bytes(model)}


METHODS = tuple(
    Method(
        name if name == SharedDecoder.name else f"stored-{name}",
        StoredConfig,
        apply,
        (StoredLinear,),
        fixed={"codec": name},
    )
    for name in CODECS
)
