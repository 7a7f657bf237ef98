import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlms.architectures import find_targets
from softlms.budget import Budget, count_parameters, parameter_costs, refill, uniform_ranks
from softlms.layers import kept_parameters
from softlms.modules import Replacement
from softlms.origin import remember
from softlms.surgery import decompose, deploy, truncate

layer_shapes = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1)


def cost(shapes, ranks):
    return sum(kept_parameters(*shapes[name], rank) for name, rank in ranks.items())


def assert_exact(shapes, ranks, limit):
    """Within the limit, and not one more component of any layer would fit."""
    assert cost(shapes, ranks) <= limit
    for name, (m, n) in shapes.items():
        assert 1 <= ranks[name] <= min(m, n)
        if ranks[name] < min(m, n):
            assert cost(shapes, ranks | {name: ranks[name] + 1}) > limit


@given(layer_shapes, st.floats(0, 1), st.integers(0, 1000))
def test_refill_is_exact_from_below(shapes, share, seed):
    least = sum(kept_parameters(m, n, 1) for m, n in shapes.values())
    most = sum(m * n for m, n in shapes.values())
    limit = least + int(share * (most - least))
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(min(shape), generator=generator).sort(descending=True).values for name, shape in shapes.items()
    }
    assert_exact(shapes, refill(parameter_costs(shapes), dict.fromkeys(shapes, 1), limit, scores), limit)
    assert_exact(shapes, uniform_ranks(parameter_costs(shapes), limit), limit)


def test_refill_is_the_best_fill_by_brute_force():
    """Equal prices: the greedy fill keeps the components with the highest scores, as trying them all shows."""
    shapes = {"a": (4, 3), "b": (3, 4), "c": (4, 3)}
    scores = {"a": [9.0, 2.0, 1.5], "b": [8.0, 7.0, 0.5], "c": [6.0, 5.0, 4.0]}
    limit = 35  # five components of price 7; a layer of two components is at 14 > 12, stored dense
    got = refill(parameter_costs(shapes), dict.fromkeys(shapes, 1), limit, scores)
    every = (dict(zip(shapes, ranks, strict=True)) for ranks in itertools.product((1, 2, 3), repeat=3))
    fitting = [ranks for ranks in every if cost(shapes, ranks) <= limit]
    best = max(fitting, key=lambda ranks: sum(sum(scores[n][:r]) for n, r in ranks.items()))
    assert got == best
    assert_exact(shapes, got, limit)


def test_refill_starts_from_what_it_is_given():
    shapes = {"a": (10, 10), "b": (10, 10)}
    flat = {"a": [0.0] * 10, "b": [1.0] * 10}
    assert refill(parameter_costs(shapes), {"a": 3, "b": 1}, 100, flat) == {"a": 3, "b": 2}
    with pytest.raises(ValueError, match="exceed the limit of 50 by 30"):
        refill(parameter_costs(shapes), {"a": 3, "b": 1}, 50, flat)
    with pytest.raises(ValueError, match="at least one component"):
        refill(parameter_costs(shapes), {"a": 0, "b": 1}, 50, flat)


def test_uniform_ranks_are_uniform():
    shapes = {f"{i}": (384, 384) for i in range(5)} | {"fc": (1536, 384)}
    ranks = uniform_ranks(parameter_costs(shapes), sum(m * n for m, n in shapes.values()) // 2)
    kept = [ranks[name] * (m + n) / (m * n) for name, (m, n) in shapes.items()]
    assert max(kept) - min(kept) < 0.01


def test_parameters_of_a_real_sized_config():
    """The counts of ../paper: BERT-base has 84.9 M weights in its blocks' linears and 109.5 M parameters."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        counted = count_parameters(BertModel(BertConfig()))
    assert counted.linear == counted.linear_dense == 84_934_656
    assert counted.total == 109_482_240


def test_counts_follow_the_ranks(tiny_bert):
    model = tiny_bert()
    dense = count_parameters(model)
    assert dense.total == sum(p.numel() for p in model.parameters()) and dense.kept("linear") == 1
    decompose(model)
    assert count_parameters(model) == dense
    for target in find_targets(model):
        target.module.set_rank_(4)
    half = count_parameters(model)
    assert half.linear == sum(4 * (m + n) for m, n in (t.shape for t in find_targets(model)))
    assert half.rest == dense.rest and half.total_dense == dense.total
    assert half.kept("linear") == half.linear / dense.linear


class Thinner(Replacement):
    """Stands for a method's own module."""

    form = "thinner"

    def __init__(self, *parts):
        super().__init__()
        self.parts = torch.nn.Sequential(*parts)


@pytest.mark.parametrize("first", ["embeddings", "linears"])
def test_a_smaller_embedding_shows_in_the_total(tiny_bert, first):
    model = tiny_bert()
    dense = count_parameters(model)

    def embeddings():
        remember(model)
        model.bert.embeddings.word_embeddings = Thinner(torch.nn.Embedding(200, 3), torch.nn.Linear(3, 32, False))

    def linears():
        truncate(model, {target.name: 4 for target in find_targets(model)})

    for step in (embeddings, linears) if first == "embeddings" else (linears, embeddings):
        step()
    counted = count_parameters(model)
    assert counted.total == sum(p.numel() for p in model.parameters()) == counted.linear + dense.rest - 6_400 + 696
    assert (counted.linear_dense, counted.total_dense) == (dense.linear, dense.total)
    # what the table saves, the linears may keep
    limit = Budget(0.9, "total").limit(Budget(0.9, "total").costs({}, counted))
    assert limit == int(0.9 * dense.total) - counted.rest


def test_blocks_that_are_gone_count_as_cut(tiny_bert):
    model = tiny_bert()
    dense = count_parameters(model)
    remember(model)
    del model.bert.encoder.layer[1:]
    counted = count_parameters(model)
    assert counted.linear == dense.linear / 2 and counted.linear_dense == dense.linear
    assert counted.total == sum(p.numel() for p in model.parameters()) and counted.total_dense == dense.total
    decompose(model)
    deploy(model, keep=0.25)
    assert count_parameters(model).linear <= 0.25 * dense.linear


def test_what_takes_the_place_of_linears_counts_as_such(tiny_bert):
    """A feed-forward of another form: its matrices are kept weights, its biases are not."""
    model = tiny_bert()
    dense = count_parameters(model)
    remember(model)
    for layer in model.bert.encoder.layer:
        layer.intermediate = Thinner(torch.nn.Linear(32, 8), torch.nn.Linear(8, 64))
    counted = count_parameters(model)
    assert counted.linear == dense.linear - 2 * 32 * 64 + 2 * 8 * (32 + 64)
    assert counted.linear_dense == dense.linear and counted.moved == 2 * 8 * (32 + 64)
    assert counted.total == sum(p.numel() for p in model.parameters()) and counted.total_dense == dense.total
    decompose(model)
    deploy(model, keep=0.5)
    assert count_parameters(model).linear <= 0.5 * dense.linear


def test_additions_count_in_the_total_alone(tiny_bert):
    model = tiny_bert()
    dense = count_parameters(model)
    remember(model)
    model.bert.exits = Thinner(torch.nn.Linear(32, 2))
    counted = count_parameters(model)
    assert counted.total == dense.total + 66 and counted.total_dense == dense.total


def test_layers_factored_later_are_no_change_of_the_rest(tiny_bert):
    model = tiny_bert()
    decompose(model)
    truncate(model, {"bert.pooler.dense": 2}, targets=lambda name, module: name == "bert.pooler.dense")
    factored = {*(target.name for target in find_targets(model)), "bert.pooler.dense"}
    assert count_parameters(model, lambda name, module: name in factored).linear_dense == 17_408
    count_parameters(model)


def test_adapters_are_no_change_of_the_rest(tiny_bert):
    peft = pytest.importorskip("peft")
    model = tiny_bert()
    truncate(model, {target.name: 4 for target in find_targets(model)})
    linear = count_parameters(model).linear
    settings = peft.LoraConfig(r=2, target_modules=["word_embeddings"], modules_to_save=["pooler"])
    adapted = peft.get_peft_model(model, settings)
    for counted in (model, adapted):
        names = {n for n, m in counted.named_modules() if type(m).__name__ == "LowRankLinear"}
        count_parameters(counted, lambda name, module, names=names: name in names)
    assert count_parameters(adapted.merge_and_unload()).linear == linear


@pytest.mark.parametrize("keep", [0, -0.5, 1.0001, 50, float("nan")])
def test_wrong_keep(keep):
    with pytest.raises(ValueError, match="keep is the share of parameters that stays"):
        Budget(keep, "linear")


def test_wrong_count():
    with pytest.raises(ValueError, match="count must be one of 'linear', 'total', 'flops', 'latency', got 'all'"):
        Budget(0.5, "all")


def test_limits():
    shapes = {"a": (10, 10), "b": (20, 10)}
    assert Budget(0.5, "linear").limit(parameter_costs(shapes, 1000, "linear")) == 150
    assert Budget(0.9, "total").limit(parameter_costs(shapes, 1000, "total")) == 170
    assert Budget(1.0, "total").limit(parameter_costs(shapes, 7, "total")) == 300


def test_impossible_budget_says_why_and_what_is_possible():
    shapes = {"a": (10, 10), "b": (20, 10)}
    with pytest.raises(
        ValueError, match=r"embeddings, biases, norms and head alone are 1,000.*count='linear'"
    ) as error:
        Budget(0.5, "total").limit(parameter_costs(shapes, 1000, "total"))
    smallest = float(str(error.value).split("smallest keep of total is ")[1].split(";")[0])
    assert Budget(smallest, "total").limit(parameter_costs(shapes, 1000, "total")) >= 50  # what it promises holds
    with pytest.raises(ValueError, match="one component per layer needs 50 weights"):
        Budget(0.1, "linear").limit(parameter_costs(shapes, 0, "linear"))
