"""The basis of thin layers: other numbers, the same layer."""

import pytest
import torch
from torch import nn

import softlms
from softlms.layers import LowRankLinear
from softlms.lowrank.basis import balance, change_basis_, rotate


def factors(r, m=24, n=40):
    """Columns that differ by five orders of magnitude, as learned ranks leave them."""
    scales = torch.logspace(0, -5, r, dtype=torch.float64)
    down, up = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    return down / scales[:, None].sqrt(), up * scales


@pytest.mark.parametrize("r", [1, 7, 8, 24])
def test_the_product_stays_and_its_size_is_spread(r):
    down, up = factors(r)
    W = up @ down
    sides = balance(down, up)
    torch.testing.assert_close(sides[1] @ sides[0], W)
    sigma = torch.linalg.svdvals(W)[:r]
    for gram in (sides[0] @ sides[0].T, sides[1].T @ sides[1]):
        torch.testing.assert_close(gram, sigma.diag(), atol=1e-9, rtol=1e-6)
    spread = rotate(*sides)
    torch.testing.assert_close(spread[1] @ spread[0], W)
    for norms in (spread[0].norm(dim=1), spread[1].norm(dim=0)):
        assert norms.max() < 4 * norms.min()


def test_a_rank_above_both_sides_falls():
    layer = LowRankLinear(torch.randn(9, 4), torch.randn(6, 9), torch.randn(6))
    x = torch.randn(3, 4)
    expected = layer(x)
    change_basis_(layer, balance, rotate)
    assert layer.rank == 4 and layer.up.in_features == 4
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_a_model_answers_as_before_and_what_the_user_set_stays(tiny_bert, tokens):
    model = tiny_bert()
    softlms.truncate(model, {target.name: 8 for target in softlms.find_targets(model)})
    layer, other = (block.attention.self.query for block in model.bert.encoder.layer)
    layer.down.requires_grad_(False)
    other.down = nn.Sequential(other.down)  # an adapter, say
    expected, before = model(tokens).logits, {n: p.clone() for n, p in model.named_parameters()}
    change_basis_(model, balance, rotate)
    torch.testing.assert_close(model(tokens).logits, expected)
    after = dict(model.named_parameters())
    moved = {name for name, values in before.items() if not values.equal(after[name])}
    thin = {
        f"{t.name}.{p}.weight" for t in softlms.find_targets(model) for p in ("down", "up") if t.module is not other
    }
    assert moved == thin and list(after) == list(before)
    assert not layer.down.weight.requires_grad and layer.up.weight.requires_grad
