"""Ranks chosen all at once: against brute force, and against what they are meant to know."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlms.budget import Budget, Costs, parameter_costs
from softlms.layers import kept_parameters
from softlms.lowrank.calibration import LayerStatistics
from softlms.lowrank.cliff import least_error_ranks, loss_increase, tail_sums
from softlms.lowrank.factorization import FACTORIZATIONS, factorize_weight

SHAPES = {"a": (6, 6), "b": (4, 9), "c": (8, 5)}
ENERGIES = st.lists(st.floats(0.01, 100), min_size=6, max_size=6)


def solve(energies, keep, multiple=1):
    costs, budget = parameter_costs(SHAPES), Budget(keep, multiple=multiple)
    errors = {
        name: tail_sums(torch.tensor(sorted(e, reverse=True)[: min(SHAPES[name])]))
        for name, e in zip(SHAPES, energies, strict=True)
    }
    ranks = least_error_ranks(costs, errors, budget.start(SHAPES), budget.limit(costs), multiple)
    return costs, budget.limit(costs), errors, ranks


@given(energies=st.tuples(ENERGIES, ENERGIES, ENERGIES), keep=st.floats(0.45, 1))
def test_no_choice_of_ranks_has_less_error_at_the_same_cost(energies, keep):
    """Where a step on the hulls ends, the optimum; elsewhere no further from it than the step that did not fit."""
    costs, limit, errors, ranks = solve(energies, keep)

    def error(chosen):
        return sum(errors[name][rank] for name, rank in chosen.items())

    every = [
        dict(zip(SHAPES, r, strict=True)) for r in itertools.product(*(range(1, min(s) + 1) for s in SHAPES.values()))
    ]
    best = min(error(r) for r in every if costs.of(r) <= limit)
    assert costs.of(ranks) <= limit
    largest_step = max(curve[1] for curve in errors.values())
    assert error(ranks) <= best + largest_step
    # what it costs is spent as well as anyone could: the Lagrangian's bound
    cheaper = [r for r in every if costs.of(r) <= costs.of(ranks)]
    assert error(ranks) <= min(error(r) for r in cheaper) + largest_step


@given(energies=st.tuples(ENERGIES, ENERGIES, ENERGIES), keep=st.floats(0.7, 0.99), multiple=st.sampled_from([1, 2]))
def test_filled_exactly_and_never_above_break_even(energies, keep, multiple):
    costs, limit, _, ranks = solve(energies, keep, multiple)
    left = limit - costs.of(ranks)
    for name, rank in ranks.items():
        m, n = SHAPES[name]
        full = min(m, n)
        assert rank == full or rank * (m + n) < m * n
        assert rank == full or rank % multiple == 0
        for more in (min((rank // multiple + 1) * multiple, full), full):
            assert rank == full or kept_parameters(m, n, more) - kept_parameters(m, n, rank) > left


def test_most_layers_stay_whole_where_uniform_ranks_cut_all():
    shapes = {f"layer {i}": (64, 64) for i in range(10)}
    costs, budget = parameter_costs(shapes), Budget(0.9)
    energy = torch.linspace(2, 1, 64)
    errors = {name: tail_sums(energy * (1 + i)) for i, name in enumerate(shapes)}
    ranks = least_error_ranks(costs, errors, budget.start(shapes), budget.limit(costs))
    assert sum(rank == 64 for rank in ranks.values()) == 8  # a tenth must go, and one component of each stays
    assert max(ranks["layer 0"], ranks["layer 1"]) < 32  # those that matter least


@given(keep=st.floats(0.4, 1), tread=st.integers(2, 4), seed=st.integers(0, 99))
def test_measured_time_with_steps_of_its_own(keep, tread, seed):
    """Where components come in groups that cost as much as one, a group is taken whole."""
    shapes = {"a": (24, 24), "b": (16, 36), "c": (32, 20)}

    def price(shape, rank):
        return float(min(-(-rank // tread) * tread * sum(shape), shape[0] * shape[1]))

    prices = {name: partial(price, shape) for name, shape in shapes.items()}
    costs = Costs("latency", shapes, prices, rest=5.0)
    limit = Budget(keep, "latency").limit(costs)
    random = torch.Generator().manual_seed(seed)
    errors = {
        name: tail_sums(torch.rand(min(shape), generator=random).sort(descending=True).values)
        for name, shape in shapes.items()
    }
    ranks = least_error_ranks(costs, errors, dict.fromkeys(shapes, 1), limit)
    assert costs.of(ranks) <= limit
    for name, rank in ranks.items():
        full = min(shapes[name])
        assert rank == full or prices[name](rank + 1) - prices[name](rank) > max(0, limit - costs.of(ranks))


def example(m=12, n=9, tokens=40):
    torch.manual_seed(1)
    W = torch.randn(m, n, dtype=torch.float64)
    x = torch.randn(tokens, n, dtype=torch.float64) * torch.linspace(0.2, 3, n)
    g = torch.randn(tokens, m, dtype=torch.float64) @ torch.randn(m, m, dtype=torch.float64)
    statistics = LayerStatistics(
        x.T @ x / tokens, x.abs().mean(0), torch.rand(n, dtype=torch.float64) + 0.1, g.T @ g / tokens
    )
    return W, x, g, statistics


@pytest.mark.parametrize("method", FACTORIZATIONS)
def test_loss_increase_is_measured_on_inputs_and_gradients(method):
    W, x, g, statistics = example()
    factors = factorize_weight(W, method, statistics)
    for kfac in (False, True):
        curve = loss_increase(factors, statistics, kfac=kfac)
        assert curve.shape == (10,) and curve[-1] == 0 and (np.diff(curve) <= 1e-9).all() | kfac
        for rank in (0, 3, 7):
            cut = (factors.U[:, :rank] * factors.sigma[:rank]) @ factors.V[:, :rank].T
            outputs = x @ (W - cut).T
            if kfac:
                expected = torch.trace(statistics.gradient @ (outputs.T @ outputs)) / len(x)
            else:
                expected = outputs.square().sum(1).mean() * g.square().mean()
            assert curve[rank] == pytest.approx(expected.item(), rel=1e-6)


def test_kfac_equals_the_mean_square_if_all_directions_matter_alike():
    W, _, _, statistics = example()
    alike = LayerStatistics(statistics.gram, statistics.mean_abs, None, 3 * torch.eye(12))
    factors = factorize_weight(W, "whitened", statistics)
    torch.testing.assert_close(
        torch.tensor(loss_increase(factors, alike, kfac=True)), torch.tensor(loss_increase(factors, alike))
    )
