"""Profiles: the same notebooks at three sizes, for encoders, language models and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from softlms.data import corpus
from softlms.evaluation.likelihood import Protocol
from softlms.experiments.full_size import FULL_SIZE
from softlms.experiments.grid import CLIFF, SVD_SOFT, TUNED, Grid, Pass, Setting
from softlms.experiments.language_models import FAMILIES, SmallModel
from softlms.experiments.recipe import Recipe
from softlms.utils.machine import fast_bf16

__all__ = [
    "ABLATION", "LANGUAGE_PROFILES", "PROFILES", "SPEED_PROFILES", "LanguageProfile", "Profile", "SpeedProfile",
    "find_profile",
]  # fmt: skip

P = TypeVar("P")


def find_profile(name: str, profiles: Mapping[str, P]) -> P:
    """A profile by its name; ValueError for an unknown one."""
    if name not in profiles:
        raise ValueError(f"Unknown profile {name!r}; known: {', '.join(profiles)}.")
    return profiles[name]


@dataclass(frozen=True)
class Profile:
    """One size of the workbook.

    Attributes
    ----------
    encoder : str
        See `softlms.data.encoders.find_encoder`.
    task, data : str
        See `softlms.data.tasks.load_task`. The environment variable SOFTLMS_DATA replaces `data` if that is "hub".
    seeds : tuple of int
        Every comparison of methods runs at each of them.
    recipe : Recipe
    max_length, train_rows
        See `softlms.experiments.bench.Bench`.
    loss_seeds : tuple of int
        Seeds at which the two compression losses are compared (notebook 02).
    ablation : mapping
        Which rows of `ABLATION` are run, and at which seeds; each is compared with the recipe at the same seeds.
    """

    name: str
    encoder: str
    task: str
    data: str
    seeds: tuple[int, ...]
    recipe: Recipe
    max_length: int = 128
    train_rows: int | None = None
    loss_seeds: tuple[int, ...] = (0, 1)
    ablation: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


# one setting at a time
ABLATION: dict[str, dict[str, Any]] = {
    "raw sigma, alpha rate x 10": {"unit": "raw", "alpha_learning_rate": 2e-2},
    "linear loss": {"compression_loss": "linear"},
    "no distillation": {"distillation": 0.0},
    "from the pretrained encoder": {"start": "pretrained"},
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "quick",
            encoder="minilm",
            task="docpairs",
            data="embedded",
            seeds=(0, 1),
            recipe=Recipe(
                dense_epochs=2,
                epochs=1.5,
                learning_rate=1e-4,
                static_learning_rate=1e-4,  # 2e-4 does not always hold on so few rows
                bf16=fast_bf16(),
            ),
            loss_seeds=(0,),
            max_length=40,
            train_rows=512,
        ),
        Profile(
            "laptop",
            encoder="minilm",
            task="mrpc",
            data="hub",
            seeds=(0, 1, 2, 3, 4),
            recipe=Recipe(
                learning_rate=1e-4, bf16=fast_bf16(), deadline=1.0, **SVD_SOFT | {"alpha_learning_rate": 2e-3}
            ),
            loss_seeds=(1,),
            ablation={"raw sigma, alpha rate x 10": (0,), "linear loss": (1,)},
        ),
        Profile(
            "paper",
            encoder="bert-base-uncased",
            task="mrpc",
            data="hub",
            seeds=(0, 1, 2, 3, 4),
            recipe=Recipe(learning_rate=1e-4),
            ablation=dict.fromkeys(ABLATION, (0, 1, 2, 3, 4)),
        ),
    )
}


@dataclass(frozen=True)
class LanguageProfile:
    """One size of the language-model notebooks.

    Attributes
    ----------
    text : str
        See `softlms.data.text.load_text`.
    models : mapping
        Family to a model trained from scratch, or to a checkpoint; see `softlms.data.encoders.find_encoder`.
    grid : Grid
        Its tasks are the families.
    window, train_tokens, test_tokens, protocol, threads
        See `softlms.experiments.language_models.LanguageBench`.
    libraries : tuple of str
        Of the embedded corpus.
    beside : mapping
        Real models by name, each with a text, a grid and a window of its own; its family is in its `models`.
    """

    name: str
    text: str
    models: Mapping[str, SmallModel | str]
    grid: Grid
    window: int = 128
    train_tokens: int | None = None
    test_tokens: int | None = None
    protocol: Protocol | None = None
    threads: int = 1
    libraries: tuple[str, ...] = corpus.LIBRARIES
    beside: Mapping[str, LanguageProfile] = field(default_factory=dict)


LANGUAGE_METHODS = ("svd+uniform", "whitened+uniform", "whitened+mask", "svd+soft", "whitened+soft")

# settings were chosen on dev at seed 0 with half of the linear weights: results/laptop/language_trials.csv
LANGUAGE_LAPTOP = Grid(
    Recipe(
        dense_learning_rate=1e-3,
        dense_epochs=2,
        distillation=0.0,
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
        # at a rate of 1e-3 it is worse than a 3-gram after an epoch; with the others' gamma it never met its budget
        "mamba": Setting(
            {"dense_epochs": 1, "dense_learning_rate": 3e-3, "learning_rate": 3e-4, "static_learning_rate": 1e-3},
            methods={"whitened+soft": {"gamma": 0.1}, "whitened+mask": {"static_learning_rate": 3e-4}},
        ),
    },
    (0, 1, 2),
    (
        Pass(LANGUAGE_METHODS, (0.5,)),
        Pass(LANGUAGE_METHODS, (0.35, 0.75)),
        Pass(CLIFF, (0.5, 0.35)),
        Pass(CLIFF, (0.75,), changes={"further_keeps": ()}),  # whole layers cannot be cut afterwards
    ),
    {**TUNED, "whitened+mask": {"static_learning_rate": 1e-4}},
)

SMOLLM2_METHODS = ("whitened+uniform", *CLIFF)
SMOLLM2_RIVALS = ("whitened+cliff", "whitened+mask", "svd+soft")
SMOLLM2_UNTUNED = (
    "asvd+uniform", "whitened+uniform", "kfac+uniform", "kfac+greedy", "whitened+cliff", "whitened+cliff-gradient",
    "whitened+cliff-energy", "kfac+cliff",
)  # fmt: skip
SMOLLM2_KEEPS = (0.9, 0.8, 0.7, 0.5)

# 100 steps of four rows; its tokens are of the training text, which calibrates too
SMOLLM2 = LanguageProfile(
    "laptop",
    "hub",
    {"llama": "smollm2"},
    Grid(
        Recipe(
            dense_epochs=0,
            distillation=0.0,
            batch_size=4,
            epochs=1,
            learning_rate=1e-4,
            static_learning_rate=1e-4,
            calibration_rows=32,
            weigh_by_size=True,
            bf16=fast_bf16(),
        ),
        {"smollm2": Setting()},
        (0, 1, 2),
        (
            Pass(("whitened+uniform",), (1.0,)),  # the dense model after the same steps
            Pass(SMOLLM2_METHODS, (0.8, 0.5)),
            Pass(SMOLLM2_UNTUNED, SMOLLM2_KEEPS, recover=False),
            Pass(("svd+uniform",), SMOLLM2_KEEPS, recover=False, seeds=(0,)),  # no seed decides anything
            Pass(SMOLLM2_RIVALS, (0.8, 0.5)),
            Pass((*SMOLLM2_METHODS, *SMOLLM2_RIVALS), (0.9, 0.7), seeds=(0,)),
            Pass(("whitened+sensitivity",), SMOLLM2_KEEPS, recover=False, seeds=(0,)),
        ),
    ),
    window=256,
    train_tokens=102_400,
    protocol=Protocol(512, tokens=8192, bf16=fast_bf16()),
    threads=2,  # two runs side by side would take 20 GB
)


def _whole_test(window: int) -> LanguageProfile:
    """SmolLM2 measured as papers measure, on the whole test split in long windows; one seed, for it takes longer."""
    passes = (
        Pass(("whitened+uniform", "kfac+cliff"), SMOLLM2_KEEPS, recover=False),
        Pass(("whitened+uniform",), (1.0,)),
        Pass(SMOLLM2_METHODS, (0.8,)),
    )
    grid = replace(SMOLLM2.grid, tasks={f"smollm2-{window}": Setting()}, seeds=(0,), passes=passes)
    return replace(SMOLLM2, grid=grid, protocol=Protocol(window, bf16=fast_bf16()))


LANGUAGE_PROFILES = {
    profile.name: profile
    for profile in (
        LanguageProfile(
            "quick",
            "embedded",
            # bytes: a model trained for a minute beats a 3-gram of bytes, but not one of subwords
            {family: SmallModel(family, hidden=128, layers=2, vocabulary=257) for family in FAMILIES},
            Grid(
                Recipe(
                    dense_learning_rate=3e-3,
                    dense_epochs=1,
                    distillation=0.0,
                    batch_size=8,
                    epochs=0.1,
                    learning_rate=5e-4,
                    static_learning_rate=5e-4,
                    calibration_rows=128,
                    further_keeps=(0.2,),
                    bf16=fast_bf16(),
                ),
                dict.fromkeys(FAMILIES, Setting()) | {"mamba": Setting({"dense_epochs": 0.8, "epochs": 0.1})},
                (0, 1),
                (Pass((*LANGUAGE_METHODS, *CLIFF), (0.35,)),),
            ),
            window=64,
            train_tokens=500_000,
            test_tokens=4096,
            libraries=corpus.SMALL_LIBRARIES,
        ),
        LanguageProfile(
            "laptop",
            "embedded",
            {family: SmallModel(family) for family in FAMILIES},
            LANGUAGE_LAPTOP,
            train_tokens=4_000_000,
            test_tokens=16384,
            beside={"smollm2": SMOLLM2, "smollm2-1024": _whole_test(1024), "smollm2-2048": _whole_test(2048)},
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
                LANGUAGE_LAPTOP,
                recipe=LANGUAGE_LAPTOP.recipe.changed(
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


@dataclass(frozen=True)
class SpeedProfile:
    """What is measured.

    Attributes
    ----------
    name : str
    models : tuple of str
        Keys of `softlms.experiments.full_size.FULL_SIZE`.
    settings : mapping
        For `softlms.experiments.speed.compare_speed`.
    changes : mapping
        Settings of single models instead.
    in_detail : tuple of str
        Models that are also timed in parts, and under onnxruntime.
    """

    name: str
    models: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    in_detail: tuple[str, ...] = ()

    def of(self, model: str) -> dict[str, Any]:
        """The settings of one model."""
        return {**self.settings, **self.changes.get(model, {})}


SPEED_LAPTOP = SpeedProfile(
    "laptop",
    tuple(FULL_SIZE),
    {"threads": (1, 2)},
    {"tinyllama-1.1b": {"rounds": 5}},
    ("bert-base", "gpt2"),
)
SPEED_PROFILES = {
    "quick": SpeedProfile(
        "quick",
        ("bert-base", "gpt2", "mamba-130m"),
        {"layers": 2, "rounds": 3, "tokens": 64, "batches": (1,)},
        in_detail=("bert-base",),
    ),
    "laptop": SPEED_LAPTOP,
    "paper": replace(SPEED_LAPTOP, name="paper"),
}
