"""The language-model notebooks at three sizes: models, text and grid of each profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from softlms import corpus
from softlms.comparison import TUNED, Grid, Pass, Setting
from softlms.hub import is_hub, pretrained
from softlms.language_models import FAMILIES, LanguageBench, SmallModel
from softlms.precision import fast_bf16
from softlms.profiles import Book, make_book, project_root
from softlms.recipe import Recipe
from softlms.text import tokenize_text
from softlms.zoo import Encoder, find_encoder

__all__ = ["LANGUAGE_PROFILES", "LanguageProfile", "open_language_book"]


@dataclass(frozen=True)
class LanguageProfile:
    """One size of the language-model notebooks.

    Attributes
    ----------
    text : str
        See `softlms.language.load_text`.
    models : mapping
        Family to a model that is trained from scratch, or to the folder or hub name of a checkpoint.
    grid : Grid
        Its tasks are the families.
    window, train_tokens, test_tokens
        See `softlms.language_models.LanguageBench`.
    libraries : tuple of str
        Of the embedded corpus.
    """

    name: str
    text: str
    models: Mapping[str, SmallModel | str]
    grid: Grid
    window: int = 128
    train_tokens: int | None = None
    test_tokens: int | None = None
    libraries: tuple[str, ...] = corpus.LIBRARIES


METHODS = ("svd+uniform", "whitened+uniform", "whitened+mask", "svd+soft", "whitened+soft")

# settings were chosen on dev at seed 0 and half of the linears: results/laptop/language_trials.csv
LAPTOP = Grid(
    Recipe(
        dense_learning_rate=1e-3,
        dense_epochs=2,
        epochs=0.1,
        learning_rate=1e-4,
        static_learning_rate=3e-4,
        weigh_by_size=True,
        further_keeps=(0.5, 0.35),
        bf16=fast_bf16(),
    ),
    {
        "gpt2": Setting({"static_learning_rate": 1e-4}),
        "llama": Setting(),
        # at a rate of 1e-3 an epoch leaves it behind a 3-gram; under the others' push it never met its budget
        "mamba": Setting(
            {"dense_epochs": 1, "dense_learning_rate": 3e-3, "learning_rate": 3e-4, "static_learning_rate": 1e-3},
            methods={"whitened+soft": {"gamma": 0.1}, "whitened+mask": {"static_learning_rate": 3e-4}},
        ),
    },
    (0, 1, 2),
    (Pass(METHODS, (0.5,)), Pass(METHODS, (0.35, 0.75))),
    {**TUNED, "whitened+mask": {"static_learning_rate": 1e-4}},
)

LANGUAGE_PROFILES = {
    profile.name: profile
    for profile in (
        LanguageProfile(
            "quick",
            "embedded",
            # bytes: a model that trains for a minute outdoes a 3-gram of bytes, but not one of words' parts
            {family: SmallModel(family, hidden=128, layers=2, vocabulary=257) for family in FAMILIES},
            Grid(
                Recipe(
                    dense_learning_rate=3e-3,
                    dense_epochs=1,
                    batch_size=8,
                    epochs=0.1,
                    learning_rate=5e-4,
                    static_learning_rate=5e-4,
                    calibration_rows=128,
                    further_keeps=(0.2,),
                    bf16=fast_bf16(),
                ),
                dict.fromkeys(FAMILIES, Setting()) | {"mamba": Setting({"dense_epochs": 0.5, "epochs": 0.06})},
                (0, 1),
                (Pass(METHODS, (0.35,)),),
            ),
            window=64,
            train_tokens=800_000,
            test_tokens=8192,
            libraries=corpus.SMALL_LIBRARIES,
        ),
        LanguageProfile(
            "laptop",
            "embedded",
            {family: SmallModel(family) for family in FAMILIES},
            LAPTOP,
            train_tokens=4_000_000,
            test_tokens=16384,
        ),
        LanguageProfile(
            "paper",
            "hub",
            {
                "gpt2": "openai-community/gpt2",
                "llama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
                "mamba": "state-spaces/mamba-130m-hf",
            },
            replace(
                LAPTOP,
                recipe=LAPTOP.recipe.changed(
                    dense_learning_rate=2e-5,
                    dense_epochs=1,
                    epochs=1,
                    learning_rate=5e-5,
                    static_learning_rate=5e-5,
                    bf16=False,
                ),
                tasks=dict.fromkeys(FAMILIES, Setting()),
                changes={},
            ),
            window=1024,
        ),
    )
}


def open_language_book(
    name: str, family: str, *, profile: str, text: str = "", checkpoint: str = "", split: bool = False
) -> Book:
    """Open a language-model notebook for a profile; its bench is a `LanguageBench`.

    Parameters
    ----------
    name : str
        The notebook's name without ending.
    family : {"gpt2", "llama", "mamba"}
    profile : str
        A key of `LANGUAGE_PROFILES`.
    text : str
        Replaces the profile's text: a folder, "hub" or "embedded"; see `softlms.language.load_text`.
    checkpoint : str
        Replaces the profile's model: folder or hub name of a causal language model of this family.
    split : bool
        See `LanguageBench`.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown profile or family, a model of another family, or as from `tokenize_text` and `find_encoder`: before any
        work.

    Notes
    -----
    It sets up the whole kernel, as `softlms.profiles.make_book` says.
    """
    if profile not in LANGUAGE_PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; known: {', '.join(LANGUAGE_PROFILES)}.")
    chosen = LANGUAGE_PROFILES[profile]
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}; known: {', '.join(FAMILIES)}.")
    known = checkpoint or chosen.models[family]
    model = find_encoder(known) if isinstance(known, str) else known
    if isinstance(model, Encoder):
        found = pretrained(AutoConfig, model.location).model_type
        if found != family:
            raise ValueError(f"{known} is a {found} model; this notebook is about {family}.")
    runs = project_root() / "runs"
    tokenizer = model.location if isinstance(model, Encoder) else model.vocabulary
    source = text or chosen.text
    if source != "embedded" and not is_hub(source):
        source = str(Path(source).expanduser())
    bench = LanguageBench(
        model,
        family,
        tokenize_text(source, tokenizer, runs, libraries=chosen.libraries),
        runs,
        window=chosen.window,
        train_tokens=chosen.train_tokens,
        test_tokens=chosen.test_tokens,
        split=split,
    )
    return make_book(name, chosen, bench, source)
