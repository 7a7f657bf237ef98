"""What the companion notebooks compare, at each size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from softlms.experiments.grid import GRIDS, Setting
from softlms.experiments.recipe import Recipe
from softlms.experiments.variants import Comparison, Variant

__all__ = ["EMBEDDINGS", "ONE_BACKBONE", "RECOVERY", "STORED", "untuned_text"]

CUT = "kfac+cliff"  # the best cut that nothing was trained for


def _recovered(adapter: str, **settings: Any) -> Variant:
    """The cut, untrained, and then an adapter."""
    return Variant(f"{CUT}+{adapter}", {"settings": {"cliff": {"epochs": 0}, adapter: settings}})


# on MiniLM r = 16 everywhere trains as many numbers as r = 1 of LoRA on queries and values: 9,216
RECOVERIES = {
    "all weights": Variant(CUT),
    "LoRA-XS, r = 4": _recovered("lora-xs", r=4),
    "LoRA-XS, r = 8": _recovered("lora-xs", r=8),
    "LoRA-XS, r = 16": _recovered("lora-xs", r=16),
    "LoRA-XS, r = 25": _recovered("lora-xs", r=25),
    "LoRA-XS, r = 16, random": _recovered("lora-xs", r=16, components="random"),
    "LoRA-XS, r = 16, bottom": _recovered("lora-xs", r=16, components="bottom"),
    "LoRA on W_Q and W_V, r = 1": _recovered("lora", r=1, alpha=1.0, symbols=("W_Q", "W_V")),
    "LoRA on W_Q and W_V, r = 8": _recovered("lora", r=8, alpha=8.0, symbols=("W_Q", "W_V")),
    "head alone": _recovered("head"),
}
FEW = ("all weights", "LoRA-XS, r = 16", "LoRA-XS, r = 16, bottom", "LoRA on W_Q and W_V, r = 1", "head alone")

LAPTOP = Comparison(
    "laptop",
    "minilm",
    "hub",
    GRIDS["laptop"].recipe.changed(epochs=2, further_keeps=()),
    {
        "mrpc": Setting(),
        "rte": Setting(),
        "sst2": Setting({"epochs": 0.4, "dense_epochs": 2}, train_rows=16000),
    },
    (0.5, 0.35),
    (0, 1, 2),
    RECOVERIES,
    ("trained", "adapter_bytes"),
)

RECOVERY = {
    "quick": replace(
        LAPTOP,
        name="quick",
        data="embedded",
        recipe=GRIDS["quick"].recipe.changed(further_keeps=()),
        tasks=GRIDS["quick"].tasks,
        keeps=(0.5,),
        seeds=(0, 1),
        variants={name: RECOVERIES[name] for name in FEW},
    ),
    "laptop": LAPTOP,
    "paper": replace(
        LAPTOP,
        name="paper",
        encoder="bert-base-uncased",
        recipe=GRIDS["paper"].recipe.changed(further_keeps=()),
        tasks={task: GRIDS["paper"].tasks[task] for task in ("mrpc", "rte", "sst2")},
        seeds=(0, 1, 2, 3, 4),
    ),
}

# few numbers that have to learn a task, not only to recover it, take longer
LONGER = {"mrpc": {"epochs": 6}, "rte": {"epochs": 6}, "sst2": {"epochs": 2, "dense_epochs": 2}}
# on a backbone that was cut before it knew any task; "dense" is all of its weights trained for one
ONE_BACKBONE = {
    name: replace(
        one,
        recipe=one.recipe.changed(start="pretrained", distillation=0.0),
        tasks={task: replace(setting, changes=LONGER.get(task, {})) for task, setting in one.tasks.items()},
        keeps=(0.5,),
        variants={
            "LoRA-XS, r = 25": Variant("lora-xs", {"settings": {"lora-xs": {"r": 25}}}),
            "head alone": Variant("head"),
        },
    )
    for name, one in RECOVERY.items()
}

TIMES = (2.5, 5.0, 10.0)
FITS = {"direction": "direction loss", "svd": "SVD", "frequency": "SVD by frequency"}


def _embeddings(fit: str, times: float, **settings: Any) -> Variant:
    return Variant(f"{fit}-embeddings", {"settings": {f"{fit}-embeddings": {"times": times, **settings}}})


SMALL = 0.35  # of the linears, beside which embeddings are cut
SOFT = f"{CUT}-soft"
BESIDE = {
    "35 % of the linears": Variant(SOFT, {"keep": SMALL}),
    "35 % of the linears, embeddings 5 times": Variant(
        f"direction-embeddings+{SOFT}",
        {"keep": SMALL, "settings": {"direction-embeddings": {"times": 5.0, "epochs": 0}}},
    ),
}
EMBEDDINGS = {
    "laptop": replace(
        LAPTOP,
        recipe=GRIDS["laptop"].recipe.changed(further_keeps=()),
        tasks=GRIDS["laptop"].tasks,
        keeps=(1.0,),
        variants={f"{FITS[fit]}, {times:g} times": _embeddings(fit, times) for times in TIMES for fit in FITS} | BESIDE,
        facts=("latent", "cosine", "rmse"),
    )
}
EMBEDDINGS["quick"] = replace(
    EMBEDDINGS["laptop"],
    name="quick",
    data="embedded",
    recipe=RECOVERY["quick"].recipe,
    tasks=RECOVERY["quick"].tasks,
    seeds=(0, 1),
    variants={
        f"{FITS[fit]}, {times:g} times": _embeddings(fit, times, **({"fit_epochs": 2} if fit == "direction" else {}))
        for times in (2.5, 10.0)
        for fit in ("direction", "svd")
    },
)
EMBEDDINGS["paper"] = replace(
    EMBEDDINGS["laptop"],
    name="paper",
    encoder="bert-base-uncased",
    recipe=RECOVERY["paper"].recipe,
    tasks=GRIDS["paper"].tasks,
    seeds=(0, 1, 2, 3, 4),
)

BYTES = (4.0, 8.0, 16.0)  # times fewer than in float32
CODECS = {
    "shared-decoder": "shared decoder",
    "stored-svd": "SVD",
    "stored-whitened-svd": "whitened SVD",
    "stored-shared-svd": "one SVD for all",
    "stored-kronecker": "Kronecker",
    "stored-pruned": "pruned",
    "stored-few-bits": "few bits",
}


def _stored(method: str, times: float, **settings: Any) -> Variant:
    return Variant(method, {"settings": {method: {"times": times, **settings}}})


ABLATED = {
    "shared decoder, 8 times, each alone": _stored("shared-decoder", 8.0, together=False),
    "shared decoder, 8 times, direction alone": _stored("shared-decoder", 8.0, cosine=1.0),
    "shared decoder, 8 times, distance alone": _stored("shared-decoder", 8.0, cosine=0.0),
}
STORED = {
    "laptop": replace(
        LAPTOP,
        recipe=GRIDS["laptop"].recipe.changed(epochs=0, distillation=0.0, further_keeps=()),
        tasks={task: setting for task, setting in GRIDS["laptop"].tasks.items() if task != "rte"},
        keeps=(1.0,),
        variants={f"{CODECS[name]}, {times:g} times": _stored(name, times) for times in BYTES for name in CODECS}
        | ABLATED,
        facts=("bytes",),
    )
}
STORED["quick"] = replace(
    STORED["laptop"],
    name="quick",
    data="embedded",
    recipe=RECOVERY["quick"].recipe.changed(epochs=0, distillation=0.0),
    tasks=RECOVERY["quick"].tasks,
    seeds=(0, 1),
    variants={
        f"{CODECS[name]}, {times:g} times": _stored(
            name, times, **({"fit_epochs": 0.5} if name == "shared-decoder" else {})
        )
        for times in (4.0, 16.0)
        for name in CODECS
    },
)
STORED["paper"] = replace(
    STORED["laptop"],
    name="paper",
    encoder="bert-base-uncased",
    recipe=RECOVERY["paper"].recipe.changed(epochs=0, distillation=0.0),
    seeds=(0, 1, 2, 3, 4),
)


def untuned_text(comparison: Comparison, model: str, recipe: Recipe, seeds: tuple[int, ...]) -> Comparison:
    """The same variants of a language model, untuned: those of embeddings or linears alone.

    Parameters
    ----------
    comparison : Comparison
    model : str
        The model's name in tables, that of its bench.
    recipe : Recipe
        Of its grid.
    seeds : tuple of int
    """
    alone = {name: variant for name, variant in comparison.variants.items() if "keep" not in variant.changes}
    untuned = recipe.changed(epochs=0, distillation=0.0)
    return replace(comparison, recipe=untuned, tasks={model: Setting()}, seeds=seeds, variants=alone)
