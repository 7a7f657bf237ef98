"""Comparisons of variants: names, rows, resuming, and paired differences."""

from dataclasses import replace

import pandas as pd
import pytest

from softlms.experiments.companions import EMBEDDINGS, RECOVERY, STORED, untuned_text
from softlms.experiments.grid import Setting
from softlms.experiments.ingredients import INGREDIENTS, WHOLE
from softlms.experiments.profiles import LANGUAGE_PROFILES
from softlms.experiments.recipe import Recipe
from softlms.experiments.variants import Comparison, Variant, paired, run_comparison
from softlms.methods.chain import parse

RECIPE = Recipe(dense_epochs=1, epochs=1, calibration_rows=16)
VARIANTS = {
    "a third": Variant("svd+uniform", {"keep": 0.35}),
    "few": Variant("svd+uniform+lora-xs", {"settings": {"uniform": {"epochs": 0}, "lora-xs": {"r": 2}}}),
    "fewer": Variant("svd+uniform+lora-xs", {"settings": {"uniform": {"epochs": 0}, "lora-xs": {"r": 1}}}),
}


def comparison(**changes):
    tasks = {"docpairs": Setting()}
    return replace(Comparison("tiny", "", "", RECIPE, tasks, (0.5,), (0,), VARIANTS, ("trained",)), **changes)


def test_each_variant_has_its_rows_and_a_second_call_runs_nothing(bench):
    benches, grown, lines = {"docpairs": bench}, [], []
    rows = run_comparison(comparison(), benches, note=lines.append, grown=lambda rows: grown.append(len(rows)))
    assert set(rows.variant) == {"dense", *VARIANTS} and set(rows.seed) == {0}
    assert grown == sorted(grown) and len(grown) == 4 and grown[-1] == len(rows)
    assert set(rows[rows.variant == "a third"].keep) == {0.35} and set(rows[rows.variant == "few"].keep) == {0.5}
    trained = rows[rows.recovered].groupby("variant").trained.max()
    assert trained["fewer"] < trained["few"] and pd.isna(trained["a third"])
    keys = ["task", "keep", "variant", "recovered", "seed", "split", "metric"]
    assert not rows.duplicated(keys).any()
    assert lines[-1].startswith("   4 of 4: docpairs, keep 0.5, fewer, seed 0: dev")
    again = []
    pd.testing.assert_frame_equal(run_comparison(comparison(), benches, note=again.append, stored_only=True), rows)
    assert again == ["4 of 4 runs are stored"]
    few = {name: VARIANTS[name] for name in ("a third", "few")}
    part = run_comparison(comparison(variants=few), benches, note=lambda line: None, stored_only=True)
    assert set(part.variant) == {"dense", "a third", "few"}


def test_nothing_stored_is_said(bench):
    with pytest.raises(FileNotFoundError, match="No run of this comparison is stored here yet"):
        run_comparison(comparison(), {"docpairs": bench}, note=lambda line: None, stored_only=True)


def test_differences_are_paired_over_seeds():
    rows = pd.DataFrame(
        [
            {"task": "a", "keep": keep, "variant": variant, "seed": seed, "recovered": True, "value": value + seed / 10}
            for keep, values in ((0.5, (0.7, 0.6)), (0.35, (0.5, 0.6)))
            for variant, value in zip(("one", "other"), values, strict=True)
            for seed in range(3)
        ]
    )
    made = paired(rows, "one", "other")
    assert made["mean"].round(6).tolist() == [10, -10] and made.seeds.tolist() == [3, 3]
    assert (made.low95 - made.high95).abs().max() < 1e-6  # the same difference at each seed
    assert made[["one", "other"]].drop_duplicates().to_numpy().tolist() == [["one", "other"]]


@pytest.mark.parametrize("comparisons", [RECOVERY, EMBEDDINGS, STORED, INGREDIENTS])
def test_every_profile_has_methods_and_settings_that_exist(comparisons):
    assert comparisons.keys() == {"quick", "laptop", "paper"}
    for profile, one in comparisons.items():
        assert one.name == profile and one.seeds == tuple(range(len(one.seeds)))
        for variant in one.variants.values():
            recipe = one.recipe.changed(**variant.changes)
            recipe.chain(parse(variant.method))  # raises for a setting that a method does not have


@pytest.mark.parametrize("profile", INGREDIENTS)
def test_what_is_left_out_of_learned_ranks_is_left_out(profile):
    """Each variant differs from the whole form, and from every other, in what its learning is told."""
    one = INGREDIENTS[profile]
    told = {}
    for name, variant in one.variants.items():
        ((_, config),) = one.recipe.changed(**variant.changes).chain(parse(variant.method))
        told[name] = config
    assert len({str(config) for config in told.values()}) == len(one.variants)
    assert one.recipe.further_keeps == ()  # else rows of a smaller budget would stand under the same name
    whole = told[WHOLE]
    assert whole.start_from == "cliff" and whole.weigh_by_saving and whole.gamma is None and whole.factors == "kfac"


def test_a_language_model_has_the_variants_that_need_no_budget_untuned():
    recipe = LANGUAGE_PROFILES["quick"].grid.recipe
    words = untuned_text(EMBEDDINGS["laptop"], "llama", recipe, (0,))
    assert words.recipe.epochs == 0 and list(words.tasks) == ["llama"] and words.seeds == (0,)
    assert set(words.variants) == {name for name in EMBEDDINGS["laptop"].variants if "linears" not in name}
