import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from softlms.budget import Budget, parameter_costs, uniform_ranks
from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS, TaskData
from softlms.data.text import SPLITS
from softlms.experiments.bench import Bench
from softlms.experiments.grid import middle_budget
from softlms.experiments.jobs import Job
from softlms.experiments.language_models import LanguageBench, SmallModel
from softlms.experiments.profiles import PROFILES
from softlms.experiments.recipe import Recipe
from softlms.experiments.report import Report
from softlms.experiments.store import Run
from softlms.experiments.tokenized import TokenizedText
from softlms.workbook.book import Book
from softlms.workbook.plots.grid_pictures import plot_quality, plot_ranks

RECIPE = Recipe(further_keeps=(0.4,))
F1 = {"dense": (0.9, 0.9), "svd+uniform": (0.7, 0.72), "whitened+uniform": (0.8, 0.84), "whitened+soft": (0.84, 0.86)}


@pytest.fixture
def bench(tiny_folder, tmp_path):
    return Bench(find_encoder(str(tiny_folder)), TaskData(TASKS["mrpc"], {}, "nowhere"), tmp_path)


@pytest.fixture
def language_bench(tmp_path):
    text = TokenizedText(dict.fromkeys(SPLITS, np.arange(200)), tmp_path, "nowhere")
    return LanguageBench(SmallModel("gpt2", hidden=64, layers=2, vocabulary=300), "gpt2", text, tmp_path)


def cell(bench, method, seed, score, metric="f1", **changes):
    costs = parameter_costs(bench.targets())
    ranks = uniform_ranks(costs, Budget(0.5, "linear").limit(costs))
    dense = method == "dense"
    result = {
        "seed": seed, "scores": {"dev": {metric: score}, "test": {metric: score}},
        "ranks": ranks, "kept_linear": 1.0 if dense else 0.5, "kept_total": 1.0 if dense else 0.7,
        "parameters_linear": 10, "parameters_total": 20, "steps": 5, "seconds": 1.0, "hardware": "a machine",
        "commit": "a commit", "versions": "", "data": "", "encoder": "", "sample": f"{method} wrote this",
    }  # fmt: skip
    if method.endswith("soft"):
        result["further"] = {"0.4": {"dev": {metric: score / 2}}}
    if not dense:
        result["untuned"] = {"dev": {metric: score / 3}}
    return Job(bench, method, RECIPE, seed), Run(result | changes)


def report_of(bench, scores, metric="f1", **changes):
    cells = [cell(bench, m, seed, s, metric, **changes) for m, both in scores.items() for seed, s in enumerate(both)]
    return Report(cells, {bench.data.task.name: bench}, (0, 1))


def test_table_shows_means_spreads_and_missing_seeds(bench):
    table = report_of(bench, F1 | {"svd+energy": (0.5,)}).table("dev")
    assert list(table.index.get_level_values("method")) == ["dense", *list(F1)[1:], "svd+energy"]
    assert table.loc[("mrpc", 0.5, 0.5, "whitened+uniform"), ("f1", "recovered")] == "82.0 ± 2.8"
    assert table.loc[("mrpc", 0.5, 0.5, "whitened+uniform"), ("f1", "untuned")] == "27.3 ± 0.9"
    assert table.loc[("mrpc", 0.5, 0.5, "svd+energy"), ("f1", "recovered")] == "50.0 (1)"
    assert table.index.names == ["task", "keep", "removed", "method"] and table.index[0] == ("mrpc", 1.0, 0.0, "dense")
    assert report_of(bench, F1).table("other") is None


def test_verdict_pairs_seeds_and_its_sign_favours_softlms(bench, language_bench):
    line = report_of(bench, F1).verdicts().iloc[0]
    assert (line.soft, line.rival, line.seeds, line.split) == ("whitened+soft", "whitened+uniform", 2, "test")
    assert line.difference == pytest.approx(3) and line.low95 < 3 < line.high95
    perplexities = {"dense": (10, 10), "svd+uniform": (30, 31), "whitened+uniform": (20, 21), "whitened+soft": (18, 18)}
    line = report_of(language_bench, perplexities, "perplexity").verdicts().iloc[0]
    assert (line.rival, line.rival_mean, line.difference) == ("whitened+uniform", 20.5, 2.5)
    lines = report_of(language_bench, perplexities | {"whitened+mask": (17, 19)}, "perplexity").verdicts()
    assert list(lines.rival) == ["whitened+mask", "whitened+uniform"] and list(lines.difference) == [0.0, 2.5]
    # what learns its ranks is no rival, whatever it starts from; what it starts from is one
    starts = {"whitened+cliff": (17, 18), "whitened+cliff-soft": (16, 18)}
    line = report_of(language_bench, perplexities | starts, "perplexity").verdicts().iloc[0]
    assert (line.soft, line.rival, line.difference) == ("whitened+cliff-soft", "whitened+cliff", 0.5)


def test_a_model_cut_further_stands_beside_the_one_trained_for_it(bench):
    trained = {"whitened+soft": (0.6, 0.6)}
    cells = report_of(bench, F1).cells
    smaller = [
        (
            Job(bench, job.method, RECIPE.changed(keep=0.4), job.seed),
            Run(run.result | {"kept_linear": 0.4, "further": {}}),
        )
        for job, run in report_of(bench, trained).cells
    ]
    line = Report([*cells, *smaller], {"mrpc": bench}, (0, 1)).cut_further().iloc[0]
    assert (line["cut further"], line["trained for it"]) == ("42.5 ± 0.7", "60.0 ± 0.0")
    assert report_of(bench, F1).cut_further()["trained for it"].tolist() == ["not run"]


def test_rows_say_how_long_they_were_trained_and_on_what_length(bench):
    rows = report_of(bench, F1).rows
    trained = rows.recovered & rows.method.ne("dense")
    assert set(rows[trained].epochs) == {RECIPE.epochs} and set(rows[~trained].epochs) == {0}
    assert set(rows.max_length) == {bench.max_length}


def test_hardware_is_not_mixed_and_budgets_are_filled(bench):
    cells = report_of(bench, F1).cells
    other = cell(bench, "svd+energy", 0, 0.5, hardware="another machine")
    with pytest.raises(ValueError, match="Rows of mrpc were made on 2 kinds of hardware"):
        Report([*cells, other], {"mrpc": bench}, (0, 1))
    for kept in (0.51, 0.45):
        with pytest.raises(ValueError, match="Not filled to the budget"):
            report_of(bench, F1 | {"svd+energy": (0.5,)}, kept_linear=kept)
    of_total = [
        (Job(bench, job.method, job.recipe.changed(count="total"), job.seed), run)
        for job, run in report_of(bench, F1).cells
    ]
    with pytest.raises(ValueError, match="Not filled to the budget: .*'kept_total': 0.7"):
        Report(of_total, {"mrpc": bench}, (0, 1))


@pytest.mark.parametrize("kind", ["bench", "language_bench"])
def test_drawings_show_every_method(kind, request):
    bench = request.getfixturevalue(kind)
    metric = bench.data.task.metrics[0]
    report = report_of(bench, F1, metric)
    quality, ranks = plot_quality(report.rows), plot_ranks(report.ranks)
    labels = [text.get_text() for text in quality.legends[0].get_texts()]
    assert labels == ["dense", "svd", "whitened", "uniform", "soft"]
    assert {ax.get_title() for ax in ranks.axes if ax.get_title()} == set(F1) - {"dense"}
    symbols = [tick.get_text() for tick in ranks.axes[0].get_yticklabels()]
    names = ["Q", "K", "V", "proj", "fc1", "fc2"] if kind == "bench" else ["QKV", "proj", "fc1", "fc2"]
    assert symbols == [f"$W_{{{name}}}$" for name in names]
    plt.close("all")


def test_the_dense_model_trained_as_long_is_a_line(language_bench):
    """It stands in the rows as any method that keeps everything."""
    report = report_of(language_bench, F1, "perplexity")
    whole = report.rows[report.rows.method == "whitened+uniform"].assign(keep=1.0, kept_linear=1.0, value=2.0)
    quality = plot_quality(pd.concat([report.rows, whole]))
    assert [text.get_text() for text in quality.legends[0].get_texts()][:2] == ["dense", "dense, trained as long"]
    untuned, recovered = quality.axes
    dashed = [[line for line in ax.lines if line.get_linestyle() == "--"] for ax in (untuned, recovered)]
    assert not dashed[0] and [line.get_ydata()[0] for line in dashed[1]] == [2.0]
    assert [tick.get_text() for tick in recovered.get_xticklabels()] == ["50"]
    assert set(middle_budget(pd.concat([report.ranks, report.ranks.assign(keep=1.0)])).keep) == {0.5}
    plt.close("all")


def test_costs_name_methods_of_equal_ranks_once(bench):
    table = report_of(bench, F1).costs(tokens=16, rounds=2)
    assert table.row.tolist() == ["dense", "svd+uniform, whitened+uniform, whitened+soft at 0.5"]
    assert 0 < table.flops_of_dense[1] < 1


def test_samples_are_those_of_the_first_seed(language_bench):
    samples = report_of(language_bench, F1, "perplexity").samples()
    pd.testing.assert_series_equal(samples.method, pd.Series(list(F1), name="method"))
    assert samples["sample"][0] == "dense wrote this" and samples.keep.tolist() == [1.0, 0.5, 0.5, 0.5]


def test_each_row_names_the_data_of_its_own_task(bench, tiny_folder, tmp_path):
    other = Bench(find_encoder(str(tiny_folder)), TaskData(TASKS["rte"], {}, "elsewhere"), tmp_path)
    cells = [
        cell(b, method, seed, 0.8, b.data.task.metrics[0], data=b.data.source)
        for b in (bench, other)
        for method in F1
        for seed in (0, 1)
    ]
    book = Book("05_test", PROFILES["quick"], bench, tmp_path / "figures", tmp_path / "results", "")
    book.save_report(Report(cells[:1], {"mrpc": bench, "rte": other}, (0, 1)))  # a grid that has just begun
    assert pd.read_csv(tmp_path / "results/05_test_verdicts.csv").empty
    book.save_report(Report(cells, {"mrpc": bench, "rte": other}, (0, 1)))
    for suffix in ("", "_ranks", "_summary", "_verdicts"):
        table = pd.read_csv(tmp_path / f"results/05_test{suffix}.csv")
        assert {task: set(rows["data"]) for task, rows in table.groupby("task")} == {
            "mrpc": {"nowhere"},
            "rte": {"elsewhere"},
        }
