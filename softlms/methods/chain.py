"""Chains: methods applied one after the other, by a name such as "whitened+soft"."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from softlms.lowrank.factorization import FACTORIZATIONS
from softlms.methods.base import Config, Method, Work
from softlms.methods.registry import methods

__all__ = ["PAPER_NAMES", "Link", "configured", "full_name", "parse", "run"]

PAPER_NAMES = {"static": "svd+uniform", "adaptive": "svd+soft"}  # the paper's names for two chains


@dataclass(frozen=True)
class Link:
    """One method of a chain, and the settings implied by its name in the chain."""

    method: Method
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "+".join([*([self.said["factors"]] if self.method.takes_factors else []), self.method.name])


def parse(name: str) -> list[Link]:
    """Parse the name of a chain into its methods.

    Parameters
    ----------
    name : str
        Names of methods joined by "+", in order of application. Those that take factors follow the name of a
        factorization: "whitened+soft". "static" and "adaptive" are the paper's names for "svd+uniform" and
        "svd+soft".

    Raises
    ------
    ValueError
        Unknown method, or a factorization without a method that takes it.
    """
    known = methods()
    links: list[Link] = []
    factors = ""
    for part in PAPER_NAMES.get(name, name).split("+"):
        method = known.get(part)
        if part in FACTORIZATIONS and not factors:
            factors = part
        elif method is None or method.takes_factors != bool(factors):
            raise ValueError(_unknown(name, known))
        else:
            links.append(Link(method, {**method.fixed, **({"factors": factors} if factors else {})}))
            factors = ""
    if factors or not links:
        raise ValueError(_unknown(name, known))
    return links


def _unknown(name: str, known: Mapping[str, Method]) -> str:
    taking = ", ".join(n for n, method in known.items() if method.takes_factors)
    others = ", ".join(n for n, method in known.items() if not method.takes_factors)
    return (
        f"Unknown method {name!r}; known: dense, {', '.join(PAPER_NAMES)}, a pair FACTORIZATION+ALLOCATION of "
        f"{', '.join(FACTORIZATIONS)} and {taking}{f', or {others}' if others else ''}; and chains of these with '+'."
    )


def full_name(name: str) -> str:
    """The name of a chain with every method spelled out."""
    return "+".join(link.name for link in parse(name))


def configured(
    links: Sequence[Link], settings: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]] | None = None
) -> list[tuple[Link, Config]]:
    """Each method with its settings.

    Parameters
    ----------
    links : sequence of Link
    settings : mapping
        For all methods; each takes those that it knows.
    own : mapping, optional
        Settings for single methods, by method name.

    Raises
    ------
    ValueError
        Settings for a method that is not in the chain, a setting that a method does not have, or a value out of range.
    """
    own = own or {}
    if strangers := own.keys() - {link.method.name for link in links}:
        raise ValueError(f"Settings for {', '.join(sorted(strangers))}: no such method in this chain.")
    result = []
    for link in links:
        names = [f.name for f in dataclasses.fields(link.method.config)]
        chosen = own.get(link.method.name, {})
        if unknown := chosen.keys() - set(names):
            raise ValueError(
                f"{link.method.name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(names)}."
            )
        shared = {name: settings[name] for name in names if name in settings}
        result.append((link, link.method.config(**{**shared, **chosen, **link.said})))
    return result


def run(model: PreTrainedModel, chain: Sequence[tuple[Link, Config]], work: Work) -> dict[str, Any]:
    """Apply the methods of a chain, one after the other.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    chain : sequence of (Link, Config)
        From `configured`.
    work : Work
        `shared` belongs to the dense model, so later methods start with it empty.

    Returns
    -------
    dict
        Merged results of the methods, in order; steps are added up, histories concatenated.
    """
    outcome: dict[str, Any] = {"steps": 0, "history": []}
    for number, (link, config) in enumerate(chain):
        if number:
            work = dataclasses.replace(work, folder=work.folder / str(number), shared={}, costs=None)
        given = link.method.apply(model, config, work)
        outcome |= given | {
            "steps": outcome["steps"] + given.get("steps", 0),
            "history": outcome["history"] + given.get("history", []),
        }
    return outcome
