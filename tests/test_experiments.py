import json
import logging

import pytest
import torch

from softlms.experiments import Bench, Recipe
from softlms.tasks import TaskData, load_task
from softlms.zoo import Encoder, find_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with MiniLM's tokenizer, saved as a user would have it."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tiny")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.2
    )
    BertForSequenceClassification(config).save_pretrained(place)
    find_encoder("minilm").tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def bench(folder, tmp_path):
    data = load_task("docpairs", "embedded")
    small = TaskData(data.task, {name: rows.select(range(48)) for name, rows in data.splits.items()}, data.source)
    return Bench(find_encoder(str(folder)), small, tmp_path / "runs", max_length=32, note=lambda line: None)


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
    (folder,) = bench.folder.iterdir()
    stamp = (folder / "result.json").stat().st_mtime_ns
    again = list(bench.runs(("dense",), RECIPE.changed(gamma=0.7), (0,)))  # gamma is nothing to a dense run
    assert again[0].result == first[0].result and (folder / "result.json").stat().st_mtime_ns == stamp
    bench.run("dense", RECIPE.changed(dense_epochs=0.5), 0)
    bench.run("dense", RECIPE, 1)
    assert len(list(bench.folder.iterdir())) == 3
    assert "1 of 1" in lines[0] and "min left" in lines[0]


def test_a_killed_run_leaves_nothing_that_counts(bench, monkeypatch):
    def killed(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr("softlms.experiments.DistillingTrainer.train", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.run("dense", RECIPE, 0)
    assert not list(bench.folder.glob("*/result.json"))
    monkeypatch.undo()
    assert bench.run("dense", RECIPE, 0).model is not None


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
    assert [path.name.split("-")[0] for path in bench.folder.iterdir()] == ["svd+soft"]  # no dense run was needed
    with pytest.raises(ValueError, match="Unknown method 'magic'"):
        bench.run("magic", RECIPE, 0)
    with pytest.raises(ValueError, match="start must be"):
        Recipe(start="scratch")
    with pytest.raises(ValueError, match="keep is the share"):
        Recipe(keep=2)


def test_find_encoder(tmp_path, monkeypatch):
    assert find_encoder("bert-base-uncased") == Encoder("bert-base-uncased", "hub: bert-base-uncased")
    with pytest.raises(FileNotFoundError, match=r"holds no model"):
        find_encoder(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_encoder("minilm").source == "hub: sentence-transformers/all-MiniLM-L6-v2"


logging.getLogger("transformers").setLevel(logging.ERROR)
