import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlms.architectures import find_targets
from softlms.budget import Budget, count_parameters, parameter_costs
from softlms.layers import kept_parameters
from softlms.lowrank.allocation import ALLOCATIONS, allocate, sensitivity_curves
from softlms.lowrank.calibration import LayerStatistics
from softlms.lowrank.factorization import factorize
from softlms.surgery import truncate


def statistics_of(factors):
    """Random inputs and gradients of each layer."""
    found = {}
    for name, f in factors.items():
        x, g = torch.randn(200, len(f.V)), torch.randn(200, len(f.U))
        found[name] = LayerStatistics(x.T @ x / 200, x.abs().mean(0), None, g.T @ g / 200)
    return found


def assert_exact(model, ranks, keep, count):
    """Within the budget as deployed and counted anew, and no layer has room for one more component."""
    deployed = count_parameters(truncate(copy.deepcopy(model), ranks))
    assert deployed.kept(count) <= keep
    shapes = {t.name: t.shape for t in find_targets(model)}
    spare = Budget(keep, count).limit(parameter_costs(shapes, deployed.rest, count)) - deployed.linear
    for name, (m, n) in shapes.items():
        price = kept_parameters(m, n, ranks[name] + 1) - kept_parameters(m, n, ranks[name])
        assert ranks[name] == min(m, n) or price > spare, name


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("keep, count", [(0.5, "linear"), (0.35, "linear"), (0.111, "linear"), (0.8, "total")])
def test_every_allocation_meets_the_budget_exactly_from_below(tiny_bert, method, keep, count):
    model = tiny_bert()
    factors = factorize(model)
    curves = {name: [(1, 5 - i / 9), (4, 2.0), (9, 1 + i / 20), (32, 0.5)] for i, name in enumerate(factors)}
    known = {"curves": curves, "statistics": statistics_of(factors)}
    assert_exact(model, allocate(model, factors, method, keep=keep, count=count, **known), keep, count)


def cut_offs(method, factors):
    """For each layer, the published rule: components kept as a function of one cut-off for all."""
    rules = {}
    for name, f in factors.items():
        (m, _), (n, _) = f.U.shape, f.V.shape
        energy = f.sigma.double().square()
        share = energy.cumsum(0) / energy.sum()
        if method == "energy":
            rules[name] = lambda tau, share=share: int((share < tau * (1 - 1e-12)).sum()) + 1
        else:
            rules[name] = lambda tau, e=energy / (m + n): max(1, int((e > tau).sum()))
    return rules


@pytest.mark.parametrize("method", ["energy", "greedy"])
@given(keep=st.floats(0.1, 0.7))
def test_ranks_are_those_of_a_bisected_cut_off(method, keep):
    """The published form: bisect one cut-off on the budget. Exact fit may only add to it."""
    model = _bert()
    factors = factorize(model)
    rules = cut_offs(method, factors)
    shapes = {name: (len(f.U), len(f.V)) for name, f in factors.items()}
    limit = Budget(keep, "linear").limit(parameter_costs(shapes))

    def ranks_at(tau):
        return {name: rule(tau) for name, rule in rules.items()}

    low, high = (0.0, 1.0) if method == "energy" else (10.0, 0.0)
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(kept_parameters(*shapes[n], r) for n, r in ranks_at(middle).items()) <= limit
        low, high = (middle, high) if fits else (low, middle)
    bisected = ranks_at(low)
    ours = allocate(model, factors, method, keep=keep, count="linear")
    added = {name: ours[name] - bisected[name] for name in ours}
    below = {n for n, (m, k) in shapes.items() if ours[n] * (m + k) < m * k}
    assert min(added.values()) >= 0
    assert sum(added[name] for name in below) <= len(shapes)


def test_greedy_keeps_the_most_energy_of_all_rank_choices():
    """Against every possible choice of ranks of two layers."""
    model = _bert()
    factors = dict(list(factorize(model).items())[:2])
    shapes = {name: (len(f.U), len(f.V)) for name, f in factors.items()}
    limit = Budget(0.4, "linear").limit(parameter_costs(shapes))

    def energy(ranks):
        return sum(factors[n].sigma[: ranks[n]].square().sum().item() for n in factors)

    ours = allocate(model, factors, "greedy", keep=0.4, count="linear")
    every = (dict(zip(factors, r, strict=True)) for r in itertools.product(range(1, 33), repeat=2))
    best = max((r for r in every if sum(kept_parameters(*shapes[n], k) for n, k in r.items()) <= limit), key=energy)
    assert energy(ours) >= energy(best) * (1 - 1e-6)


def test_sensitivity_measures_each_layer_alone_and_spares_the_one_that_matters(tiny_bert, tokens):
    model = tiny_bert()
    factors = factorize(model)
    with torch.no_grad():
        dense = model(tokens).logits

    def loss():
        with torch.no_grad():
            return (model(tokens).logits - dense).square().mean().item()

    before = {name: id(module) for name, module in model.named_modules()}
    curves = sensitivity_curves(model, factors, loss)
    assert {name: id(module) for name, module in model.named_modules()} == before
    for name, curve in curves.items():
        m, n = len(factors[name].U), len(factors[name].V)
        expected = sorted({1, *(int(ratio * m * n / (m + n)) for ratio in (0.2, 0.4, 0.6, 0.8))})
        assert [rank for rank, _ in curve] == [*expected, min(m, n)]
        ranks = {other: min(len(f.U), len(f.V)) for other, f in factors.items()} | {name: expected[1]}
        alone = truncate(copy.deepcopy(model), ranks)
        with torch.no_grad():
            assert curve[1][1] == pytest.approx((alone(tokens).logits - dense).square().mean().item(), rel=1e-3)
    name = "bert.encoder.layer.0.output.dense"
    loud = curves | {name: [(rank, 100 * value) for rank, value in curves[name]]}
    quiet, louder = (
        allocate(model, factors, "sensitivity", keep=0.4, count="linear", curves=c) for c in (curves, loud)
    )
    assert louder[name] > quiet[name]


def test_bad_input_is_refused(tiny_bert):
    model = tiny_bert()
    factors = factorize(model)
    with pytest.raises(ValueError, match="Unknown allocation 'best'; known: uniform, energy, greedy, sensitivity"):
        allocate(model, factors, "best", keep=0.5, count="linear")
    with pytest.raises(ValueError, match="needs curves"):
        allocate(model, factors, "sensitivity", keep=0.5, count="linear")
    for method in ("cliff", "cliff-kfac"):
        with pytest.raises(ValueError, match=r"needs statistics=softlms.calibrate\(.*gradient_rows"):
            allocate(model, factors, method, keep=0.5)
    for method in ALLOCATIONS:
        with pytest.raises(ValueError, match="one component per layer needs"):
            allocate(model, factors, method, keep=0.01, count="linear", curves={})
    with pytest.raises(ValueError, match=r"query cut is not finite"):
        sensitivity_curves(model, factors, lambda: float("nan"))
    assert not any("down" in name for name, _ in model.named_parameters())


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)
