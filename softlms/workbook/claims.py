"""Claims, the paper's and our own, each with the result rows that measure it, and a verdict.

They are in ``results/claims.toml``; `Claim` documents the fields.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = [
    "DIFFERS",
    "NOT_COMPARABLE",
    "NOT_RUN",
    "REPRODUCED",
    "WITHIN",
    "Claim",
    "Judged",
    "agrees",
    "claims_table",
    "judge",
    "load_claims",
]

REPRODUCED, WITHIN, DIFFERS = "REPRODUCED", "WITHIN TOLERANCE", "DIFFERS"
NOT_COMPARABLE, NOT_RUN = "NOT COMPARABLE", "NOT RUN"

BOUNDS = ("at_least", "at_most", "equals")
AGGREGATES = ("mean", "min", "max", "count")
CHOICES = {
    "who": ("paper", "softlms"),
    "ground": ("PAPER", "SUCCESSOR", "OURS"),
    "profile": ("quick", "laptop", "paper", "any"),
    "aggregate": AGGREGATES,
}
TEXTS = ("id", "who", "ground", "text", "unit", "profile", "setup", "file", "column", "aggregate", "pattern")
NUMBERS = (*BOUNDS, "scale", "tolerance")


@dataclass(frozen=True)
class Claim:
    """One sentence, and the rows that measure it.

    Attributes
    ----------
    id, text : str
    who : {"paper", "softlms"}
        Who makes the claim.
    ground : {"PAPER", "SUCCESSOR", "OURS"}
        Its source; our own claims are OURS.
    unit, setup : str
        Unit of the value; setup of the claim (model, data, budget), for readers.
    profile : str
        It is judged on rows of this profile; "any" if the rows belong to none.
    file : str
        CSV file in ``results``; ``{profile}`` stands for the profile that is verified.
    where : mapping
        Rows by column: a value, a list of values, or a table with ``at_least`` or ``at_most``.
    column, aggregate, scale
        The mean (or ``min``, ``max``, ``count``) of this column over these rows, times `scale`.
    pattern : str
        Regular expression whose group is the number, if the column holds text.
    minus, over : mapping, optional
        Other rows, whose aggregate is subtracted, or divided by.
    needs : mapping
        Conditions, like `where`, that all these rows must meet for a meaningful comparison.
    at_least, at_most, equals : float, optional
        The claimed value: one of the three. A claim without one is only measured.
    tolerance : float
        How far short of the value is still WITHIN TOLERANCE.
    """

    id: str
    who: str
    ground: str
    text: str
    unit: str
    profile: str
    setup: str
    file: str
    column: str
    where: Mapping[str, Any] = field(default_factory=dict)
    aggregate: str = "mean"
    scale: float = 1
    pattern: str = ""
    minus: Mapping[str, Any] | None = None
    over: Mapping[str, Any] | None = None
    needs: Mapping[str, Any] = field(default_factory=dict)
    at_least: float | None = None
    at_most: float | None = None
    equals: float | None = None
    tolerance: float = 0

    @property
    def bound(self) -> str:
        """The one of `BOUNDS` that it has; empty if it has none."""
        return next((name for name in BOUNDS if getattr(self, name) is not None), "")

    @property
    def claimed(self) -> float | None:
        """The value of its bound."""
        return getattr(self, self.bound) if self.bound else None


@dataclass(frozen=True)
class Judged:
    """A claim, its measured value (None without rows), its verdict, and the reason if one is needed."""

    claim: Claim
    measured: float | None
    verdict: str
    why: str = ""


def load_claims(path: Path) -> list[Claim]:
    """Read claims.

    Raises
    ------
    ValueError
        Not valid TOML, or a claim is malformed: its id and the field are named.
    FileNotFoundError
        There is no such file.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if unknown := set(tables) - {"claim"}:
        raise ValueError(f"{path.name}: unknown table {min(unknown)!r}; known: claim.")
    entries = tables.get("claim", [])
    claims = [
        _parse(entry, f"{path.name}: claim {entry.get('id', f'number {i}')!r}") for i, entry in enumerate(entries, 1)
    ]
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ValueError(f"{path.name}: claim {name!r}: field 'id' is used by two claims.")
    return claims


def _parse(entry: dict[str, Any], place: str) -> Claim:
    known = {f.name: f for f in dataclasses.fields(Claim)}
    for name, value in entry.items():
        if name not in known:
            raise ValueError(f"{place}: field {name!r} is unknown; known: {', '.join(known)}.")
        kind: Any = str if name in TEXTS else (int, float) if name in NUMBERS else dict
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{place}: field {name!r} cannot be {value!r}.")
        if value not in CHOICES.get(name, (value,)):
            raise ValueError(f"{place}: field {name!r} is {value!r}; known: {', '.join(CHOICES[name])}.")
    for name, known_field in known.items():
        optional = (
            known_field.default is not dataclasses.MISSING or known_field.default_factory is not dataclasses.MISSING
        )
        if name not in entry and not optional:
            raise ValueError(f"{place}: field {name!r} is missing.")
    claim = Claim(**entry)
    if sum(getattr(claim, name) is not None for name in BOUNDS) > 1:
        raise ValueError(f"{place}: field {claim.bound!r} cannot be combined with another of {', '.join(BOUNDS)}.")
    if claim.minus is not None and claim.over is not None:
        raise ValueError(f"{place}: field 'minus' cannot be combined with 'over'.")
    if (claim.who == "softlms") != (claim.ground == "OURS"):
        raise ValueError(f"{place}: field 'ground' is {claim.ground!r}: OURS is for softlms' claims, and these only.")
    for name in ("where", "minus", "over", "needs"):
        for column, wanted in (entry.get(name) or {}).items():
            if isinstance(wanted, dict) and not (wanted and set(wanted) <= {"at_least", "at_most"}):
                raise ValueError(f"{place}: field {name!r}: {column} takes at_least and at_most, got {wanted!r}.")
    try:
        groups = re.compile(claim.pattern).groups
    except re.error as error:
        raise ValueError(f"{place}: field 'pattern' is {claim.pattern!r}: {error}.") from error
    if claim.pattern and groups != 1:
        raise ValueError(f"{place}: field 'pattern' must have one group, the number, got {claim.pattern!r}.")
    if claim.tolerance < 0:
        raise ValueError(f"{place}: field 'tolerance' cannot be {claim.tolerance!r}.")
    return claim


def agrees(shown: str, value: float) -> bool:
    """Whether `value` may be written as `shown`: it is within half a unit of the last digit.

    Examples
    --------
    >>> agrees("2.3", 2.2501), agrees("2.3", 2.36)
    (True, False)
    """
    digits = len(shown.partition(".")[2])
    return abs(value - float(shown)) <= 0.5 * 10**-digits + 1e-9


def judge(claim: Claim, results: Path, profile: str) -> Judged:
    """Measure a claim on a profile's rows and compare.

    REPRODUCED is at or better than the claimed value (``equals``: the same when rounded to its digits). WITHIN
    TOLERANCE is short of it by no more than the tolerance. DIFFERS is further off. A claim without a bound is
    REPRODUCED if it could be measured. NOT COMPARABLE: the rows are not those that the claim is about, by its profile
    or its needs. NOT RUN: there are no rows, or a number is missing in them.

    Parameters
    ----------
    claim : Claim
    results : Path
        The folder ``results``.
    profile : str
        The profile of the rows.

    Raises
    ------
    ValueError
        A column that is not in the file or not numeric: the claim and the field are named.
    """
    path = results / claim.file.replace("{profile}", profile)
    if not path.is_file():
        return Judged(claim, None, NOT_RUN, f"there is no {path.relative_to(results.parent)}")
    table = pd.read_csv(path)
    sides = [_choose(table, claim, name) for name in ("where", "minus", "over") if getattr(claim, name) is not None]
    values = [_aggregate(rows, claim) for rows in sides]
    if any(rows.empty for rows in sides) or any(pd.isna(value) for value in values):
        return Judged(claim, None, NOT_RUN, f"{path.name} has no such rows")
    measured = values[0]
    if len(values) == 2:
        measured = values[0] - values[1] if claim.minus is not None else values[0] / values[1]
    measured *= claim.scale
    for column, wanted in claim.needs.items():
        if not all(column in rows and _matches(rows[column], wanted).all() for rows in sides):
            found = ", ".join(map(str, sides[0][column].unique())) if column in table else "not in the rows"
            return Judged(claim, measured, NOT_COMPARABLE, f"{column} is {found}, a claim about {_say(wanted)}")
    if claim.profile not in (profile, "any"):
        return Judged(claim, measured, NOT_COMPARABLE, f"rows of {profile}, a claim about {claim.profile}")
    return Judged(claim, measured, _compare(claim, measured))


def _choose(table: pd.DataFrame, claim: Claim, name: str) -> pd.DataFrame:
    chosen = table
    for column, wanted in getattr(claim, name).items():
        if column not in table:
            raise ValueError(f"claim {claim.id!r}: field {name!r} names {column!r}, which {claim.file} lacks.")
        chosen = chosen[_matches(chosen[column], wanted)]
    return chosen


def _matches(values: pd.Series, wanted: Any) -> pd.Series:
    if isinstance(wanted, dict):
        if not pd.api.types.is_numeric_dtype(values):
            raise ValueError(f"column {values.name!r} is not numeric: at_least and at_most cannot be used there.")
        return values.between(wanted.get("at_least", -float("inf")), wanted.get("at_most", float("inf")))
    return values.isin(wanted) if isinstance(wanted, list) else values == wanted


def _say(wanted: Any) -> str:
    if isinstance(wanted, dict):
        return " and ".join(f"{bound.replace('_', ' ')} {value}" for bound, value in wanted.items())
    return " or ".join(wanted) if isinstance(wanted, list) else str(wanted)


def _aggregate(rows: pd.DataFrame, claim: Claim) -> float:
    if claim.column not in rows:
        raise ValueError(f"claim {claim.id!r}: field 'column' names {claim.column!r}, which {claim.file} lacks.")
    values = rows[claim.column]
    if claim.pattern:
        values = values.str.extract(claim.pattern)[0]
    try:
        values = values.astype(float)
        return float(values.agg(claim.aggregate)) if values.notna().all() else float("nan")
    except ValueError as error:
        raise ValueError(f"claim {claim.id!r}: field 'column': {claim.column!r} of {claim.file}: {error}.") from error


def _compare(claim: Claim, measured: float) -> str:
    claimed = claim.claimed
    if claimed is None:
        return REPRODUCED
    short = {"at_least": claimed - measured, "at_most": measured - claimed, "equals": abs(measured - claimed)}[
        claim.bound
    ]
    if agrees(str(claimed), measured) if claim.bound == "equals" else short <= 0:
        return REPRODUCED
    return WITHIN if short <= claim.tolerance + 1e-9 else DIFFERS


def claims_table(judged: list[Judged]) -> pd.DataFrame:
    """One row for each claim, with its claimed and measured value and its verdict, for notebook 10."""
    rows = []
    for one in judged:
        claim = one.claim
        rows.append(
            {"claim": claim.id, "who": claim.who, "ground": claim.ground, "text": claim.text, "setup": claim.setup}
            | {"holds_for": claim.profile, "bound": claim.bound, "claimed": claim.claimed, "unit": claim.unit}
            | {"tolerance": claim.tolerance, "measured": one.measured, "verdict": one.verdict, "why": one.why}
        )
    return pd.DataFrame(rows)
