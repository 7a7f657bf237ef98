"""Budgets of FLOPs and of measured time; ranks that hardware likes; dense where thin is not faster."""

import copy
import pickle

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, default_data_collator

import softlms
from softlms.budget import Budget, Costs, ParameterCount, parameter_costs, refill, uniform_ranks
from softlms.layers import LowRankLinear

SHAPES = {"a": (96, 64), "b": (64, 64), "c": (64, 128)}


def slow_thin(shapes, rest=0.0, overhead=0.5, count="latency"):
    """Times as on a machine where two products cost `overhead` of the dense one more than their weights say."""

    def price(m, n):
        return lambda rank: min(m * n, rank * (m + n) + overhead * m * n) if rank < min(m, n) else m * n

    return Costs(count, shapes, {name: price(*shape) for name, shape in shapes.items()}, rest)


@given(st.floats(0.15, 1), st.sampled_from([1, 4, 8, 16]), st.integers(0, 10**6))
def test_ranks_are_multiples_and_fill_the_budget(keep, multiple, seed):
    costs = parameter_costs(SHAPES)
    budget = Budget(keep, "linear", multiple)
    try:
        limit = budget.limit(costs)
    except ValueError:
        assert costs.of(budget.start(SHAPES)) > int(keep * costs.dense)
        return
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(min(s), generator=generator).sort(descending=True).values for n, s in SHAPES.items()}
    for ranks in (refill(costs, budget.start(SHAPES), limit, scores, multiple), uniform_ranks(costs, limit, multiple)):
        assert costs.of(ranks) <= limit
        for name, rank in ranks.items():
            full = min(SHAPES[name])
            assert rank % multiple == 0 or rank == full
            assert rank == full or costs.of(ranks | {name: min(rank + multiple, full)}) > limit


def test_layers_that_would_not_be_faster_are_dense():
    costs = slow_thin(SHAPES)
    for name, (m, n) in SHAPES.items():
        first = costs.dense_from(name)
        assert costs.keeps_dense(name, first) and not costs.keeps_dense(name, first - 1)
        assert (first - 1) * (m + n) < m * n / 2 <= first * (m + n)
    counted = Budget(0.5, "linear").costs(SHAPES, ParameterCount(0, 0, 0, 0), costs)  # parameters, with that rule
    assert counted.prices["b"](costs.dense_from("b") - 1) < 64 * 64 / 2
    assert counted.prices["b"](costs.dense_from("b")) == 64 * 64
    assert parameter_costs(SHAPES).dense_from("b") == 32


def test_flops_are_those_of_the_products(tiny_bert):
    model = tiny_bert()
    costs = softlms.count_flops(model, batch=2, tokens=10)
    linear = sum(m * n for m, n in costs.shapes.values())
    assert costs.dense - costs.rest == 2 * 20 * linear
    # beside them: scores and context of 2 blocks, the pooler and the classifier on 2 rows
    attention = 2 * 2 * (2 * 2 * 10 * 10 * 32)
    assert costs.rest == attention + 2 * 2 * 32 * 32 + 2 * 2 * 32 * 2
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_measured_times_rise_with_the_rank_and_dense_caps_them():
    model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=300)).eval()
    costs = softlms.measure_latency(model, tokens=64, rounds=5)
    assert costs.count == "latency" and costs.rest >= 0
    for name, (m, n) in costs.shapes.items():
        times = [costs.prices[name](rank) for rank in range(1, min(m, n) + 1)]
        assert times == sorted(times) and times[0] > 0 and times[-1] < 1
    assert costs.prices["transformer.h.0.mlp.c_fc"](16) < 0.8 * costs.prices["transformer.h.0.mlp.c_fc"](256)


def test_dense_from_break_even_on_whatever_was_measured():
    fast = softlms.measure.TimePrice(
        384, 384, (16, 96, 176), (1.0, 2.0, 2.5), 3.0
    )  # noise: thin at its last seems faster
    costs = Costs("latency", {"a": (384, 384)}, {"a": fast})
    assert costs.dense_from("a") == 192 and fast(191) == 2.5 and fast(192) == fast(384) == 3.0
    assert pickle.loads(pickle.dumps(costs)).of({"a": 100}) == costs.of({"a": 100})


def test_layers_that_see_fewer_tokens_cost_less(tiny_bert):
    model = tiny_bert()
    costs = softlms.count_flops(model, batch=2, tokens=10, targets=lambda name, module: "dense" in name)
    assert costs.prices["bert.pooler.dense"](32) == 2 * 2 * 32 * 32  # one token a row
    assert costs.prices["bert.encoder.layer.0.output.dense"](32) == 2 * 20 * 64 * 32
    assert costs.rest > 0


@pytest.mark.parametrize("count", ["flops", "latency"])
def test_training_meets_a_budget_of_flops_or_time(tiny_bert, tmp_path, count):
    model = tiny_bert()
    shapes = {target.name: target.shape for target in softlms.find_targets(model)}
    costs = softlms.count_flops(model, tokens=16) if count == "flops" else slow_thin(shapes, rest=5000.0, overhead=0.2)
    rows = datasets.Dataset.from_list([{"input_ids": list(range(i, i + 8)), "labels": i % 2} for i in range(32)])
    trainer = softlms.SoftTrainer(
        softlms.decompose(model), keep=0.6, count=count, costs=costs, multiple=4, deadline=0.5, alpha_learning_rate=0.1,
        args=TrainingArguments(str(tmp_path), max_steps=12, use_cpu=True, report_to=[], disable_tqdm=True),
        train_dataset=rows, data_collator=default_data_collator,
    )  # fmt: skip
    trainer.train()
    ranks = softlms.ranks(model)
    assert costs.rest + costs.of(ranks) <= 0.6 * costs.dense
    assert all(rank % 4 == 0 for rank in ranks.values())
    assert any(rank < min(shapes[name]) for name, rank in ranks.items())
    softlms.deploy(model, costs=costs)
    for target in softlms.find_targets(model):
        assert isinstance(target.module, LowRankLinear) != costs.keeps_dense(target.name, ranks[target.name])


def test_a_layer_that_is_never_called_costs_nothing():
    shapes = {"a": (8, 8), "unused": (8, 8)}
    costs = Costs("flops", shapes, {"a": lambda rank: 16.0 * rank if rank < 4 else 64.0, "unused": lambda rank: 0.0})
    assert uniform_ranks(costs, 32.0) == {"a": 2, "unused": 8}


def test_every_verb_takes_them(tiny_bert):
    model = tiny_bert()
    factors = softlms.factorize(model)
    shapes = {target.name: target.shape for target in softlms.find_targets(model)}
    costs = slow_thin(shapes, overhead=0.2)
    for method in ("uniform", "energy", "greedy"):
        ranks = softlms.allocate(model, factors, method, keep=0.7, count="latency", multiple=4, costs=costs)
        assert costs.of(ranks) <= 0.7 * costs.dense and all(rank % 4 == 0 for rank in ranks.values())
    cut = softlms.truncate(copy.deepcopy(model), ranks, factors, costs=costs)
    dense = {t.name for t in softlms.find_targets(cut) if isinstance(t.module, torch.nn.Linear)}
    assert dense == {name for name, rank in ranks.items() if costs.keeps_dense(name, rank)}
    soft = softlms.decompose(model)
    softlms.deploy(soft, 0.8, "latency", multiple=8, costs=costs)
    left = {t.name: getattr(t.module, "rank", min(t.shape)) for t in softlms.find_targets(soft)}
    assert costs.of(left) <= 0.8 * costs.dense and all(rank % 8 == 0 for rank in left.values())


def test_bad_costs_are_refused(tiny_bert):
    model = tiny_bert()
    factors = softlms.factorize(model)
    shapes = {target.name: target.shape for target in softlms.find_targets(model)}
    with pytest.raises(ValueError, match=r"count='latency' needs costs=softlms.measure_latency\(model"):
        softlms.allocate(model, factors, "greedy", keep=0.5, count="latency")
    with pytest.raises(ValueError, match=r"count='flops' needs costs=softlms.count_flops"):
        softlms.allocate(model, factors, "greedy", keep=0.5, count="flops", costs=slow_thin(shapes))
    with pytest.raises(ValueError, match="costs are of another model"):
        softlms.allocate(model, factors, "greedy", keep=0.5, count="linear", costs=slow_thin(SHAPES))
    soft = softlms.decompose(copy.deepcopy(model))
    other = slow_thin({name: (m, n + 1) for name, (m, n) in shapes.items()})
    for verb in (
        lambda: softlms.truncate(model, dict.fromkeys(shapes, 4), costs=other),
        lambda: softlms.deploy(soft, costs=other),
    ):
        with pytest.raises(ValueError, match="costs are of another model"):
            verb()
    assert len(softlms.ranks(soft)) == len(shapes) and not any("down" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="everything but the target linears takes 90% of it"):
        whole = sum(m * n for m, n in shapes.values())
        softlms.allocate(model, factors, "greedy", keep=0.5, count="latency", costs=slow_thin(shapes, 9.0 * whole, 0.1))
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        Budget(0.5, "linear", 0)
    for multiple in (1.5, float("inf")):
        with pytest.raises(ValueError, match="multiple must be a whole number"):
            Budget(0.5, "linear", multiple)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        softlms.count_flops(model, tokens=0)
    with pytest.raises(ValueError, match="is factored already: measure costs on the dense model"):
        softlms.count_flops(softlms.decompose(copy.deepcopy(model)))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        softlms.measure_latency(model, rounds=0)
