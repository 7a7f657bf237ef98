import dataclasses
import json
import logging
import math
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from softlms.budget import BudgetNotMet
from softlms.data.encoders import Encoder, find_encoder
from softlms.distillation import DistillingTrainer
from softlms.experiments import bench as experiments
from softlms.experiments.bench import Bench
from softlms.experiments.jobs import Job, available_processes, run_jobs
from softlms.experiments.recipe import ABSENT, Recipe
from softlms.methods import soft
from softlms.utils.machine import use_threads

RECIPE = Recipe(
    bf16=True,
    dense_epochs=1,
    epochs=4,
    batch_size=8,
    learning_rate=1e-3,
    static_learning_rate=1e-3,
    alpha_learning_rate=0.1,
    distillation=0.5,
)


def folders(bench):
    """What lies where runs are stored, without the locks."""
    return list(bench.folder.glob("[!.]*"))


def test_three_methods_meet_one_budget(bench):
    dense, static, adaptive = (run.result for run in bench.runs(("dense", "static", "adaptive"), RECIPE, (0,)))
    assert dense["kept_linear"] == 1
    for result in (static, adaptive):
        assert 0.49 < result["kept_linear"] <= 0.5
        assert set(result["scores"]) == {"dev", "test"} and set(result["scores"]["dev"]) == {"f1", "accuracy"}
    assert static["steps"] == adaptive["steps"] == 24
    assert static["ranks"].keys() == adaptive["ranks"].keys() == dense["ranks"].keys()
    assert adaptive["history"][0]["kept_linear"] > adaptive["history"][-1]["kept_linear"]
    assert "untuned" in static


def test_a_run_is_done_once_and_again_when_something_changes(bench):
    lines = []
    bench.note = lines.append
    first = list(bench.runs(("dense",), RECIPE, (0,)))
    (folder,) = folders(bench)
    stamp = (folder / "result.json").stat().st_mtime_ns
    again = list(bench.runs(("dense",), RECIPE.changed(gamma=0.7), (0,)))  # gamma is nothing to a dense run
    assert again[0].result == first[0].result and (folder / "result.json").stat().st_mtime_ns == stamp
    bench.run("dense", RECIPE.changed(dense_epochs=0.5), 0)
    bench.run("dense", RECIPE, 1)
    assert len(folders(bench)) == 3
    assert lines[:2] == ["0 of 1 runs are stored", "1 to do: none like it is stored"]
    assert "1 of 1" in lines[2] and "min left" in lines[2] and lines[3] == "1 of 1 runs are stored"


def test_it_says_what_has_changed_since_a_stored_run(bench, monkeypatch):
    bench.run("dense", RECIPE, 0)
    changed = RECIPE.changed(dense_epochs=0.5)
    assert bench.why_missing("dense", changed, 0) == "changed: recipe.dense_epochs 1 -> 0.5"
    assert bench.why_missing("dense", RECIPE, 1) == "none like it is stored"
    monkeypatch.setattr("softlms.experiments.store.ALIKE", 1)
    assert bench.why_missing("dense", changed.changed(batch_size=4), 0) == "none like it is stored"
    monkeypatch.undo()
    known = experiments.code_behind
    monkeypatch.setattr(experiments, "code_behind", lambda *starts: known(*starts) | {"DistillingTrainer": "other"})
    assert bench.why_missing("dense", RECIPE, 0) == "changed: code of DistillingTrainer"
    monkeypatch.setattr(experiments, "code_behind", lambda *starts: dict.fromkeys("edcba", "other") | known(*starts))
    assert bench.why_missing("dense", RECIPE, 0) == "changed: code of a, b, c, d and 1 more"
    monkeypatch.undo()
    bench.run("dense", changed, 0)  # the most similar of two counts
    assert bench.why_missing("dense", changed.changed(batch_size=4), 0) == "changed: recipe.batch_size 8 -> 4"


def test_a_killed_run_leaves_nothing_that_counts(bench, monkeypatch):
    def killed(trainer, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("softlms.experiments.steps.DistillingTrainer.train", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.run("dense", RECIPE, 0)
    assert not list(bench.folder.glob("*/result.json"))
    monkeypatch.undo()
    assert bench.run("dense", RECIPE, 0).model is not None


def test_a_dense_training_continues_where_it_was_killed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("softlms.experiments.steps.SAVE_STEPS", 2)
    whole = Bench(bench.encoder, bench.data, tmp_path / "whole", max_length=32).run("dense", RECIPE, 0).result
    step, steps = DistillingTrainer.training_step, []

    def killed(trainer, *args):
        steps.append(trainer.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(trainer, *args)

    monkeypatch.setattr("softlms.experiments.steps.DistillingTrainer.training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.run("dense", RECIPE, 0)
    (partial,) = folders(bench)
    assert sorted(path.name for path in (partial / "trainer").iterdir()) == ["checkpoint-4"]
    half = partial / "trainer/checkpoint-6"  # the power failed while the next one was written
    half.mkdir()
    run = bench.run("dense", RECIPE, 0)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5]
    for same in ("scores", "history", "steps"):
        assert run.result[same] == whole[same]
    saved = [
        load_file(path) for path in (*tmp_path.glob("whole/*/model/*.safetensors"), run.model / "model.safetensors")
    ]
    assert all(torch.equal(saved[0][name], values) for name, values in saved[1].items())
    assert {path.name for path in run.model.parent.iterdir()} == {"model", "depends.json", "result.json"}


def test_a_seed_gives_the_same_numbers(bench, tmp_path):
    results = []
    for name in ("a", "b"):
        bench.folder = tmp_path / name
        result = bench.run("adaptive", RECIPE, 0).result
        results.append(
            {k: result[k] for k in ("scores", "ranks", "frozen_at")} | {"loss": result["history"][-1]["loss"]}
        )
    assert json.dumps(results[0]) == json.dumps(results[1])


def test_pretrained_start_and_wrong_input(bench):
    assert bench.run("adaptive", RECIPE.changed(start="pretrained", distillation=0.0, epochs=8), 0).result["frozen_at"]
    assert [path.name.split("-")[0] for path in folders(bench)] == ["svd+soft"]  # no dense run was needed
    with pytest.raises(ValueError, match="Unknown method 'magic'"):
        bench.run("magic", RECIPE, 0)
    with pytest.raises(ValueError, match="start must be"):
        Recipe(start="scratch")
    with pytest.raises(ValueError, match="keep is the share"):
        Recipe(keep=2)
    for name in ("dense_learning_rate", "learning_rate", "static_learning_rate", "alpha_learning_rate", "deadline"):
        for value in (0.0, -1.0, 1.5, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be positive and at most 1, got {value}"):
                Recipe(**{name: value})
    for name in ("gamma", "s", "epochs", "dense_epochs"):
        for value in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
                Recipe(**{name: value})
    for changes, message in (
        ({"distillation": math.nan}, "distillation is a share"),
        ({"further_keeps": (0.3, math.nan)}, "keep is the share"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"calibration_rows": 0}, "calibration_rows must be at least 1, got 0"),
        ({"unit": "mode"}, "unit must be one of"),
        ({"compression_loss": "cubic"}, "compression_loss one of adaptive, linear"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**changes)
    assert Recipe(epochs=0, dense_epochs=0).epochs == 0  # taken as they are


def test_find_encoder(tmp_path, monkeypatch):
    assert find_encoder("bert-base-uncased") == Encoder("bert-base-uncased", "hub: bert-base-uncased")
    with pytest.raises(FileNotFoundError, match=r"contains no model"):
        find_encoder(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_encoder("minilm").source == "hub: sentence-transformers/all-MiniLM-L6-v2"


logging.getLogger("transformers").setLevel(logging.ERROR)


RULES = ("energy", "greedy", "sensitivity", "mask", "soft")
PAIRS = [(factors, rule) for factors in ("fwsvd", "asvd", "whitened") for rule in RULES]
WITH_CLIFF = ("cliff", "cliff-gradient", "cliff-sensitivity", "cliff-soft")
PAIRS += [("svd", "cliff"), ("kfac", "mask"), ("kfac", "soft")]
PAIRS += [(factors, rule) for factors in ("whitened", "kfac") for rule in WITH_CLIFF]


@pytest.mark.parametrize("factorization, allocation", PAIRS)
def test_every_pair_meets_the_budget_with_and_without_recovery(bench, factorization, allocation):
    recipe = RECIPE.changed(calibration_rows=16, mask_learning_rate=0.5)
    tuned = bench.run(f"{factorization}+{allocation}", recipe, 0).result
    assert 0.49 < tuned["kept_linear"] <= 0.5 and tuned["steps"] == 24
    assert set(tuned["scores"]) == {"dev", "test"} and set(tuned["untuned"]) == {"dev"}
    if allocation != "mask":  # masks have to learn
        untuned = bench.run(f"{factorization}+{allocation}", recipe.changed(epochs=0, distillation=0.0), 0).result
        assert untuned["steps"] == 0 and untuned["scores"] == untuned["untuned"]
        assert set(untuned["scores"]) == {"dev", "test"} and untuned["scores"]["dev"] == tuned["untuned"]["dev"]
        assert "soft" in allocation or untuned["ranks"] == tuned["ranks"]


def test_masks_learn_and_recover_within_the_same_steps(bench):
    result = bench.run("svd+mask", RECIPE.changed(mask_learning_rate=0.5), 0).result
    assert 0 < result["mask_steps"] < result["steps"] == 24
    assert len({entry["step"] for entry in result["history"]}) == len(result["history"])


def test_masks_may_take_all_the_steps_there_are(bench, monkeypatch):
    monkeypatch.setattr("softlms.methods.masks._search", lambda model, factors, *_: (dict.fromkeys(factors, 5), 24))
    result = bench.run("svd+mask", RECIPE, 0).result
    assert result["steps"] == result["mask_steps"] == 24 and result["history"] == []


def steps(bench):
    """What the key of each step knows of the library."""
    return {pair: set(bench._depends(pair, RECIPE, 0)["code"]) for pair in ("dense", "svd+energy", "svd+soft")}


def test_each_step_has_a_key_of_its_own(bench):
    code = steps(bench)
    assert {"train_dense", "Bench", "DistillingTrainer", "evaluate"} <= code["dense"]
    assert {"allocate", "factorize", "truncate"} <= code["svd+energy"] - code["dense"]
    assert {"SoftTrainer", "SoftSchedule", "soft_threshold", "AIM"} <= code["svd+soft"] - code["dense"] - code[
        "svd+energy"
    ]
    for names in code.values():  # what keeps runs and tells of them is not among what makes them
        assert not names & {"Recipe", "Job", "run_jobs", "tell_stored", "why_missing", "hardware", "lock", "Book"}


def test_what_follows_depends_on_the_dense_run(bench, monkeypatch):
    before = {pair: bench._place(pair, RECIPE, 0)[1].name for pair in ("dense", "svd+energy", "svd+soft")}
    known = experiments.code_behind

    def changed(step, *others):
        return known(step, *others) | ({"DistillingTrainer": "other"} if step.__name__ == "train_dense" else {})

    monkeypatch.setattr(experiments, "code_behind", changed)
    assert all(bench._place(pair, RECIPE, 0)[1].name != name for pair, name in before.items())
    scratch = RECIPE.changed(start="pretrained", distillation=0.0)
    own = bench._place("svd+soft", scratch, 0)[1].name
    monkeypatch.undo()
    assert bench._place("svd+soft", scratch, 0)[1].name == own  # it needs no dense run


def test_a_new_setting_at_the_value_that_stands_for_none_changes_no_key(bench):
    @dataclasses.dataclass(frozen=True)
    class Larger(Recipe):
        heads: int = dataclasses.field(default=1, metadata={ABSENT: 1})
        depth: int = dataclasses.field(default=2, metadata={ABSENT: 0})  # a default that is not what was before

    def place(recipe):
        return bench._place("svd+soft", recipe, 0)[1].name

    settings = dataclasses.asdict(RECIPE)
    assert place(Larger(**settings, depth=0)) == place(RECIPE)
    assert len({place(RECIPE), place(Larger(**settings)), place(Larger(**settings, depth=0, heads=2))}) == 3


@pytest.mark.parametrize("method", ["dense", "static"])
def test_a_run_that_two_processes_want_is_made_once(bench, monkeypatch, method):
    """Threads stand for processes: the lock is between open files. Neither deletes what the other made."""
    make, made = Bench._make, []
    bench.run("dense", RECIPE, 1 if method == "dense" else 0)

    def slowly(*args):
        made.append(args)
        time.sleep(0.3)
        return make(*args)

    monkeypatch.setattr(Bench, "_make", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: bench.run(method, RECIPE, 0), range(2))
    assert len(made) == 1 and first.result == second.result == bench.stored(method, RECIPE, 0).result
    assert [path for path in folders(bench) if "partial" in path.name] == []


def test_one_run_gives_smaller_models(bench):
    result = bench.run("adaptive", RECIPE.changed(further_keeps=(0.7, 0.3, 0.2)), 0).result
    assert set(result["further"]) == {"0.3", "0.2"}  # only smaller ones
    assert bench.run("adaptive", RECIPE.changed(further_keeps=(0.7, 0.3, 0.2)), 0).result == result


def test_the_papers_names_are_pairs(bench):
    named, pair = (bench.run(method, RECIPE, 0).result for method in ("static", "svd+uniform"))
    assert named | {"method": ""} == pair | {"method": ""} and named["method"] == "static"
    for wrong in ("svd", "svd+best", "pca+soft", "soft"):
        with pytest.raises(ValueError, match=f"Unknown method '{re.escape(wrong)}'; known: dense, static, adaptive"):
            bench.run(wrong, RECIPE, 0)


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(bench):
    units = [[Job(bench, method, RECIPE, seed) for method in ("dense", "static")] for seed in (0, 1)]
    there = {(job.method, job.seed): run.result for job, run in run_jobs(units, processes=2)}
    stored = {path.name: path.stat().st_mtime_ns for path in bench.folder.glob("*/result.json")}
    assert there.keys() == {("dense", 0), ("static", 0), ("dense", 1), ("static", 1)}
    again = {(job.method, job.seed): run.result for job, run in run_jobs(units, processes=1)}
    assert again == there and stored == {p.name: p.stat().st_mtime_ns for p in bench.folder.glob("*/result.json")}
    other = Bench(bench.encoder, bench.data, bench.folder.parent / "other", bench.max_length)
    with use_threads(2):  # a run has one thread wherever it runs
        assert all(bench.stored(job.method, job.recipe, job.seed) for unit in units for job in unit)
        for (method, seed), result in there.items():
            alone = other.run(method, RECIPE, seed).result
            assert (alone["scores"], alone["ranks"]) == (result["scores"], result["ranks"])
            assert alone["hardware"] == result["hardware"]
        assert torch.get_num_threads() == 2


def test_a_run_has_the_threads_of_its_bench(bench):
    wide = dataclasses.replace(bench, threads=2)
    one, two = (of.run("dense", RECIPE, 0).result["hardware"] for of in (bench, wide))
    assert (one.replace("1 threads", "2 threads"), len(folders(bench))) == (two, 2)
    assert available_processes(2) == 1 <= available_processes()


class SlowBench:
    """Stands for a bench: one run fails while another one is at work."""

    def __init__(self, folder):
        self.folder = folder

    def stored(self, method, recipe, seed):
        return method if (self.folder / method).exists() else None

    def run(self, method, recipe, seed):
        awaited = {"fails": "started", "works": "failing"}.get(method)
        (self.folder / "started").touch()
        while awaited and not (self.folder / awaited).exists():
            time.sleep(0.05)
        if method == "fails":
            (self.folder / "failing").touch()
            raise BudgetNotMet("by this run")
        time.sleep(0.5)
        (self.folder / method).touch()


@pytest.mark.slow
def test_a_failing_run_names_its_error_and_spares_the_one_beside_it(tmp_path):
    units = [[Job(SlowBench(tmp_path), method, None, 0)] for method in ("works", "fails", "comes later")]
    runs = run_jobs(units, processes=2)
    assert next(runs)[0].method == "works"
    with pytest.raises(BudgetNotMet, match="by this run") as failed:
        next(runs)
    assert "in run" in failed.value.__notes__[0]  # where it happened, in the other process
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failing", "started", "works"]


def test_a_run_depends_on_what_its_name_implies(bench, monkeypatch):
    """ "cliff-soft" is "soft" with settings that no recipe has."""
    _, before = bench._place("whitened+cliff-soft", RECIPE, 0)
    changed = [
        dataclasses.replace(m, fixed=m.fixed | {"headroom": 0.5}) if m.name == "cliff-soft" else m for m in soft.METHODS
    ]
    monkeypatch.setattr(soft, "METHODS", changed)
    monkeypatch.setattr("softlms.methods.registry._registered", {})
    _, after = bench._place("whitened+cliff-soft", RECIPE, 0)
    assert before.name != after.name


def test_calibration_on_other_rows_is_not_taken_for_the_same(bench):
    """A method may have its own number of rows, and shares memory with others of the same dense model."""
    recipe = RECIPE.changed(epochs=0, distillation=0.0, calibration_rows=32)
    fewer = recipe.changed(settings={"greedy": {"calibration_rows": 2}})
    alone = bench.run("whitened+greedy", fewer, 0).result["ranks"]
    shutil.rmtree(bench._place("whitened+greedy", fewer, 0)[1])
    assert bench.run("whitened+greedy", recipe, 0).result["ranks"] != alone
    assert bench.run("whitened+greedy", fewer, 0).result["ranks"] == alone
