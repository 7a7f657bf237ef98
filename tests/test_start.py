"""Thresholds that start at given ranks, beside layers that stay whole."""

import copy
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainingArguments

from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.layers import SoftLinear
from softlms.lowrank.factorization import factorize
from softlms.methods.base import Work
from softlms.methods.soft import SoftConfig, apply
from softlms.origin import remember
from softlms.surgery import budget_shapes, decompose, deploy, truncate
from softlms.training import SoftTrainer


@pytest.fixture
def started(tiny_bert):
    """A model whose first block stays whole, its dense form, and the ranks of all layers."""
    dense = tiny_bert()
    factors = factorize(dense)
    ranks = {name: 32 if ".layer.0." in name else 9 for name in factors}
    return dense, decompose(copy.deepcopy(dense), factors, ranks=ranks), ranks


def train(model, place, **settings):
    rows = [{"input_ids": torch.randint(5, 200, (8,)), "labels": i % 2} for i in range(32)]
    args = TrainingArguments(
        str(place), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    trainer = SoftTrainer(model, args=args, train_dataset=rows, **settings)
    trainer.train()
    return trainer


def test_outputs_are_those_of_the_cut_model(started, tokens):
    dense, soft, ranks = started
    assert {name for name, module in soft.named_modules() if isinstance(module, SoftLinear)} == {
        name for name, rank in ranks.items() if rank < 32
    }
    with torch.no_grad():
        cut = truncate(copy.deepcopy(dense), ranks)(tokens).logits
        torch.testing.assert_close(soft(tokens).logits, cut, atol=1e-5, rtol=1e-4)
    assert {name: soft.get_submodule(name).rank for name in ranks if ranks[name] < 32} == {
        name: 9 for name in ranks if ranks[name] < 32
    }


def test_frozen_layers_start_there_too(tiny_bert):
    model = tiny_bert().requires_grad_(False)
    ranks = dict.fromkeys(factorize(model), 7)
    decompose(model, ranks=ranks)
    assert {t.module.rank for t in find_targets(model)} == {7}


def test_the_budget_counts_what_stays_whole(started, tmp_path):
    _, soft, ranks = started
    assert budget_shapes(soft).keys() == ranks.keys()
    trainer = train(soft, tmp_path, keep=0.62, weigh_by_saving=True)
    assert trainer.ranks.keys() == ranks.keys()
    deploy(soft)
    kept = count_parameters(soft).kept("linear")
    assert kept <= 0.62 and kept > 0.61  # exact: one component more of the smallest layer is a hundredth
    whole = [t.name for t in find_targets(soft) if isinstance(t.module, torch.nn.Linear)]
    assert all(name in whole for name, rank in ranks.items() if rank == 32)


def test_cut_further_after_training(started):
    _, soft, _ = started
    deploy(soft, keep=0.6)
    assert count_parameters(soft).kept("linear") <= 0.6


def test_a_saved_soft_model_knows_what_stays_whole(started, tmp_path):
    _, soft, ranks = started
    soft.save_pretrained(tmp_path / "soft")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soft")
    assert budget_shapes(again) == budget_shapes(soft) and budget_shapes(again).keys() == ranks.keys()


def test_later_surgery_does_not_forget_them(started):
    _, soft, ranks = started
    remember(soft, ["another"])
    assert budget_shapes(soft).keys() == ranks.keys()


def test_thresholds_start_above_the_budget_however_small_the_layers(tiny_bert):
    """Else there would be nothing to learn, and nothing to cut to the budget before it is learned."""
    model = tiny_bert()
    factors = factorize(model)
    rows = datasets.Dataset.from_dict({})
    work = Work(rows, None, 0, Path(), None, score=lambda cut: {"kept": count_parameters(cut).kept("linear")})
    for headroom in (1e-9, 0.3, 1.0):
        config = SoftConfig(factors="svd", keep=0.5, epochs=0, start_from="cliff-energy", headroom=headroom)
        cut = copy.deepcopy(model)
        work.shared = {"svd": factors}
        assert 0.49 < apply(cut, config, work)["untuned"]["kept"] <= 0.5
    with pytest.raises(ValueError, match="headroom must be positive and at most 1, got 0"):
        SoftConfig(start_from="cliff", headroom=0)


def test_above_break_even_a_layer_is_pushed_less(tiny_bert, tmp_path):
    """Of a 32 x 32 layer, ranks 16 and above cost as much as the dense one."""
    model = tiny_bert()
    factors = factorize(model)
    some, whole, key = (f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value", "key"))
    last = "bert.encoder.layer.0.attention.self.key"
    decompose(model, factors, ranks=dict.fromkeys(factors, 9) | {some: 20, whole: 31, last: 1})
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = SoftTrainer(model, keep=0.5, args=args, weigh_by_saving=True)
    weights = dict(zip(trainer.soft_layers, trainer.layer_weights().tolist(), strict=True))
    assert sum(weights.values()) == pytest.approx(len(weights))
    # what cutting it down to one component saves, 15 of them, over how many go
    assert weights[some] == pytest.approx(15 / 19 * weights[key])
    assert weights[whole] == pytest.approx(15 / 30 * weights[key])
    assert weights[last] == 0  # one component stays
    large = "bert.encoder.layer.1.output.dense"  # 32 x 64: a component of it saves half as much again
    assert weights[large] == pytest.approx(1.5 * weights[key])


def test_bad_input_is_refused(tiny_bert, tmp_path):
    model = tiny_bert()
    names = list(factorize(model))
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="leave every layer whole"):
        decompose(model, ranks=dict.fromkeys(names, 32))
    with pytest.raises(ValueError, match="must be 1 to 32, got 33"):
        decompose(model, ranks=dict.fromkeys(names, 33))
    with pytest.raises(ValueError, match="ranks must name each target once"):
        decompose(model, ranks={names[0]: 3})
    assert {name: id(module) for name, module in model.named_modules()} == before
    decompose(model, ranks=dict.fromkeys(names, 32) | {names[0]: 9})
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"keep=0.5 cannot be met: the 11 layers .* left whole are too large"):
        SoftTrainer(model, keep=0.5, args=args)
    with pytest.raises(ValueError, match="choose one"):
        SoftTrainer(model, keep=0.99, args=args, weigh_by_size=True, weigh_by_saving=True)
