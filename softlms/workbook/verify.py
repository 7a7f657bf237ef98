"""``softlms verify``: check claims, the results page and README's table against the committed rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from softlms.experiments.profiles import PROFILES, find_profile
from softlms.workbook.claims import (
    DIFFERS,
    NOT_COMPARABLE,
    NOT_RUN,
    REPRODUCED,
    WITHIN,
    Claim,
    Judged,
    judge,
    load_claims,
)
from softlms.workbook.registry import project_root
from softlms.workbook.results_page import PAGE, check_results, write_results
from softlms.workbook.state import check_derived

__all__ = ["failures", "verify"]

COLOURS = {REPRODUCED: "green", WITHIN: "cyan", DIFFERS: "bold red", NOT_COMPARABLE: "dim", NOT_RUN: "yellow"}
COMMITTED = "laptop"  # the profile of the page's rows


def verify(
    profile: str = COMMITTED, *, write: bool = False, root: Path | None = None, console: Console | None = None
) -> int:
    """Judge every claim on a profile's rows, and compare the generated tables with the committed ones.

    Parameters
    ----------
    profile : str
        The profile on whose rows claims are judged.
    write : bool
        First rewrite the page and README's table.
    root : Path, optional
        The checkout; found from the working folder when not given.
    console : rich.console.Console, optional

    Returns
    -------
    int
        Exit status: 0, or 1 if one of our own claims fails at its profile, or a table differs from its rows.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile, malformed claims or markers, or no checkout.
    """
    console = console or Console()
    find_profile(profile, PROFILES)
    root = root or project_root()
    results = root / "results"
    judged = [judge(claim, results, profile) for claim in load_claims(results / "claims.toml")]
    if write:
        write_results(root)
    wrong, stale = check_derived(results / COMMITTED), check_results(root)
    console.print(_table(judged, profile))
    failed = failures(judged, profile)
    for line in (*failed, *wrong, *stale):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    if stale:
        console.print(f"softlms verify --write rewrites {PAGE} and README's table.")
    return int(bool(failed or wrong or stale))


def failures(judged: Sequence[Judged], profile: str) -> list[str]:
    """Our own claims about this profile that its rows do not support, with what they show instead."""
    failed = []
    for one in judged:
        claim = one.claim
        if claim.who != "softlms" or claim.profile not in (profile, "any") or one.verdict in (REPRODUCED, WITHIN):
            continue
        failed.append(f"claim {claim.id}: {one.verdict}: {one.why or _claimed(claim)}, measured {one.measured}")
    return failed


def _table(judged: Sequence[Judged], profile: str) -> Table:
    caption = "claimed: >= at least, <= at most; empty: measured only"
    table = Table("claim", "who", "claimed", "measured", "unit", "verdict", title=f"Claims, {profile}", caption=caption)
    for one in judged:
        claim = one.claim
        measured = "" if one.measured is None else f"{one.measured:.4g}"
        why = f"\n[dim]{one.why}[/dim]" if one.why else ""
        verdict = f"[{COLOURS[one.verdict]}]{one.verdict}[/]"
        table.add_row(
            f"{claim.id}\n[dim]{claim.text}[/dim]", claim.who, _claimed(claim), measured, claim.unit, verdict + why
        )
    return table


def _claimed(claim: Claim) -> str:
    sign = {"at_least": ">= ", "at_most": "<= ", "equals": "", "": ""}[claim.bound]
    value = f"{claim.claimed:g}" if claim.bound else ""
    return sign + value + (f", tolerance {claim.tolerance:g}" if claim.tolerance else "")
