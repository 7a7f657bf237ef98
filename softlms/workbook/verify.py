"""``softlms verify``: claims and README's tables against rows, and no number in prose that nothing stands for."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from softlms.experiments.profiles import PROFILES
from softlms.workbook.claims import (
    DIFFERS,
    NOT_COMPARABLE,
    NOT_RUN,
    REPRODUCED,
    WITHIN,
    Claim,
    Judged,
    agrees,
    judge,
    load_claims,
)
from softlms.workbook.readme_tables import BLOCK, check_tables, write_tables
from softlms.workbook.registry import project_root
from softlms.workbook.state import check_derived

__all__ = ["check_prose", "failures", "verify"]

COLOURS = {REPRODUCED: "green", WITHIN: "cyan", DIFFERS: "bold red", NOT_COMPARABLE: "dim", NOT_RUN: "yellow"}
COMMITTED = "laptop"  # whose rows README tells of
NUMBER = r"([+-]?\d+(?:\.\d+)?)"
# what looks like a result: a decimal point, or a unit behind it
UNITS = r"\\?%|\u00d7|(?:x(?!\s*\d)|GB|MB|ms|s|seconds?|minutes?|hours?|times|points?|percent|perplexity)\b"
RESULT = re.compile(rf"(?<![\w.])[+-]?\d+(?:\.\d+|(?=\s*(?:\*\*\s*)?(?:{UNITS})))")
# no prose: generated blocks, code, links, the numbers of papers
NO_PROSE = re.compile(
    rf"{BLOCK.pattern.replace('?P<name>', '').replace('?P<text>', '')}|```.*?```|`[^`\n]*`|\]\([^)]*\)|arXiv\s[\d.]+",
    re.DOTALL,
)


@dataclass(frozen=True)
class Setting:
    """A text of a file whose numbers are no results, and why."""

    where: str
    text: str
    reason: str


def verify(
    profile: str = COMMITTED, *, write: bool = False, root: Path | None = None, console: Console | None = None
) -> int:
    """Judge every claim on a profile's rows, and README and the notebooks' prose on the committed ones.

    Parameters
    ----------
    profile : str
        Whose rows claims are judged on.
    write : bool
        Write README's generated tables anew first.
    root : Path, optional
        The checkout; found from the working folder when not given.
    console : rich.console.Console, optional

    Returns
    -------
    int
        Exit status: 0, or 1 where one of our own claims fails at its profile, or README or a notebook says otherwise.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile, malformed claims or markers, or no checkout.
    """
    console = console or Console()
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(PROFILES)}.")
    root = root or project_root()
    results, readme = root / "results", root / "README.md"
    claims = load_claims(results / "claims.toml")
    settings = _load_settings(results / "claims.toml")
    judged = [judge(claim, results, profile) for claim in claims]
    if write:
        write_tables(readme, results)
    wrong = check_derived(results / COMMITTED)
    wrong += check_tables(readme.read_text("utf-8"), results) + check_prose(root, claims, settings)
    console.print(_table(judged, profile))
    failed = failures(judged, profile)
    for line in (*failed, *wrong):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    if any(line.startswith("table ") for line in wrong):
        console.print("softlms verify --write writes README's tables anew.")
    return int(bool(failed or wrong))


def failures(judged: Sequence[Judged], profile: str) -> list[str]:
    """Our own claims about this profile that its rows do not bear out, with what they are instead."""
    failed = []
    for one in judged:
        claim = one.claim
        if claim.who != "softlms" or claim.profile not in (profile, "any") or one.verdict in (REPRODUCED, WITHIN):
            continue
        failed.append(f"claim {claim.id}: {one.verdict}: {one.why or _claimed(claim)}, measured {one.measured}")
    return failed


def check_prose(root: Path, claims: Sequence[Claim], settings: Sequence[Setting]) -> list[str]:
    """Where README's Results or a notebook's markdown has a number that no claim or setting stands for, or a wrong one.

    Parameters
    ----------
    root : Path
        The checkout.
    claims : sequence of Claim
        Texts with ``{measured}`` are held against rows of the claim's own profile.
    settings : sequence of Setting
        Each text must stand in its file.
    """
    texts = {"README.md": (root / "README.md").read_text("utf-8")}
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        prose = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        texts[f"notebooks/{path.name}"] = "\n\n".join(prose)
    wrong: list[str] = []
    bound: dict[str, list[tuple[int, int]]] = {name: [] for name in texts}
    for claim in claims:
        for where, said in claim.says.items():
            matches = list(_pattern(said).finditer(texts.get(where, "")))
            if not matches:
                wrong.append(f"claim {claim.id}: {where} does not say {said!r}")
            bound[where] = bound.get(where, []) + [match.span() for match in matches]
            value = claim.claimed if "{claimed}" in said else _measure(claim, root / "results")
            for match in matches:
                if value is not None and not agrees(match[1], value):
                    wrong.append(f"claim {claim.id}: {where} says {match[0]!r}, and it is {value:.5g}")
    for setting in settings:
        matches = list(_pattern(setting.text).finditer(texts.get(setting.where, "")))
        if not matches:
            wrong.append(f"setting: {setting.where} does not say {setting.text!r}")
        bound[setting.where] = bound.get(setting.where, []) + [match.span() for match in matches]
    for name, text in texts.items():
        for start, end in _result_numbers(name, text):
            if not any(first <= start and end <= last for first, last in bound[name]):
                around = " ".join(text[max(0, start - 40) : end + 20].split())
                wrong.append(
                    f"{name}: {text[start:end]} in '... {around} ...' is in no claim and no setting of claims.toml"
                )
    return wrong


def _measure(claim: Claim, results: Path) -> float | None:
    return judge(claim, results, COMMITTED if claim.profile == "any" else claim.profile).measured


def _pattern(text: str) -> re.Pattern[str]:
    """Finds a text, whatever its line breaks; the group is the number."""
    words = r"\s+".join(re.escape(word) for word in text.split())
    return re.compile(re.sub(r"\\{(?:measured|claimed)\\}", lambda _: NUMBER + r"(?!\.?\d)", words))


def _result_numbers(name: str, text: str) -> Iterator[tuple[int, int]]:
    """Where in a text's prose results seem to stand; of README, its Results sections."""
    first, last = 0, len(text)
    if name == "README.md":
        if "\n## Results\n" not in text or "\n## " not in text.partition("\n## Results\n")[2]:
            raise ValueError("README.md has no section '## Results' with another behind it: its numbers stand there.")
        first = text.index("\n## Results\n")
        last = text.index("\n## ", first + 1)
    prose = NO_PROSE.sub(lambda match: " " * len(match[0]), text)
    return (match.span() for match in RESULT.finditer(prose, first, last))


def _load_settings(path: Path) -> list[Setting]:
    settings = []
    for i, entry in enumerate(tomllib.loads(path.read_text("utf-8")).get("setting", []), 1):
        if set(entry) != {"where", "text", "reason"} or not all(isinstance(v, str) and v for v in entry.values()):
            raise ValueError(f"{path.name}: setting number {i} must have where, text and reason, got {entry}.")
        settings.append(Setting(**entry))
    return settings


def _table(judged: Sequence[Judged], profile: str) -> Table:
    caption = "claimed: >= at least, <= at most; README: the number that stands there"
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
    sign = {"at_least": ">= ", "at_most": "<= ", "equals": "", "": "README"}[claim.bound]
    value = f"{claim.claimed:g}" if claim.bound else ""
    return sign + value + (f", tolerance {claim.tolerance:g}" if claim.tolerance else "")
