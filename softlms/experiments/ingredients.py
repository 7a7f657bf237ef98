"""What each part of `cliff-soft` gives: learned ranks with one part left out at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from softlms.experiments.grid import GRIDS
from softlms.experiments.variants import Comparison, Variant

__all__ = ["INGREDIENTS", "WHOLE"]

WHOLE, CHOICE = "learned from the choice", "the choice alone, nothing learned"
BARE = "start at 0, and layers weigh alike"


def _learned(**settings: Any) -> Variant:
    """Learned thresholds of kfac factors, with settings in place of those that `cliff-soft` implies."""
    return Variant("kfac+soft", {"settings": {"soft": settings}})


VARIANTS = {
    WHOLE: Variant("kfac+cliff-soft"),
    CHOICE: Variant("kfac+cliff"),
    "start at 0, not at the choice": _learned(weigh_by_saving=True),
    "layers weigh alike, not by what they save": _learned(start_from="cliff"),
    BARE: _learned(),
    "gamma 0.1 throughout, not adaptive": Variant("kfac+cliff-soft", {"gamma": 0.1}),
    "start a tenth of the way to break-even, not a third": Variant(
        "kfac+cliff-soft", {"settings": {"cliff-soft": {"headroom": 0.1}}}
    ),
    "factors that know no gradients": Variant("whitened+cliff-soft"),
    "plain factors, the paper's form": Variant("svd+soft"),
}

LAPTOP = Comparison(
    "laptop",
    "minilm",
    "hub",
    GRIDS["laptop"].recipe.changed(further_keeps=()),
    {"mrpc": GRIDS["laptop"].tasks["mrpc"]},
    (0.5, 0.35),
    (0, 1, 2),
    VARIANTS,
    ("frozen_at",),
)
INGREDIENTS = {
    "quick": replace(
        LAPTOP,
        name="quick",
        data="embedded",
        recipe=GRIDS["quick"].recipe.changed(further_keeps=()),
        tasks=GRIDS["quick"].tasks,
        keeps=(0.5,),
        seeds=(0, 1),
        variants={name: VARIANTS[name] for name in (WHOLE, CHOICE, BARE)},
    ),
    "laptop": LAPTOP,
    "paper": replace(
        LAPTOP,
        name="paper",
        encoder="bert-base-uncased",
        recipe=GRIDS["paper"].recipe.changed(further_keeps=()),
        tasks={"mrpc": GRIDS["paper"].tasks["mrpc"]},
        seeds=(0, 1, 2, 3, 4),
    ),
}
