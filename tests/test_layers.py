import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softlms.layers import UNITS, LowRankLinear, SoftLinear, kept_parameters, svd
from softlms.thresholds import SHARPNESS, SoftThreshold, hard_threshold, soft_threshold

sizes = st.integers(1, 20)
units = st.sampled_from(sorted(UNITS))


@given(sizes, sizes, st.sampled_from([0.0, 0.3]), st.sampled_from([5.0, 50.0]), units, st.booleans())
def test_decomposing_keeps_the_output(m, n, alpha, s, unit, bias):
    linear = nn.Linear(n, m, bias=bias)
    soft = SoftLinear.from_linear(linear, alpha=alpha, s=s, unit=unit)
    x = torch.randn(4, n)
    torch.testing.assert_close(soft(x), linear(x), rtol=1e-4, atol=1e-5)


@given(sizes, sizes, st.integers(1, 40), st.floats(0, 0.9))
def test_forward_is_the_formula_and_deploys_to_the_same(m, n, tokens, alpha):
    soft = SoftLinear.from_linear(nn.Linear(n, m), unit="max")
    soft.threshold.alpha.data.fill_(alpha)
    x = torch.randn(tokens, n)
    t = soft_threshold(soft.sigma / soft.threshold.unit, alpha, SHARPNESS) * soft.threshold.unit
    expected = F.linear(x, soft.U @ torch.diag(t) @ soft.V.T, soft.bias)
    torch.testing.assert_close(soft(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.linear(x, soft.weight, soft.bias), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.deployed()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", range(1, 13))
def test_deployed_form_is_thin_only_where_that_is_smaller(rank):
    soft = SoftLinear.from_linear(nn.Linear(12, 24))
    soft.set_rank_(rank)
    deployed = soft.deployed()
    weights = sum(p.numel() for n, p in deployed.named_parameters() if not n.endswith("bias"))
    assert weights == kept_parameters(24, 12, rank)
    assert isinstance(deployed, LowRankLinear if rank * 36 < 24 * 12 else nn.Linear)


def test_dead_components_are_not_multiplied():
    soft = SoftLinear.from_linear(nn.Linear(32, 32))
    x = torch.randn(8, 32)  # few tokens: through the factors

    def flops():
        with FlopCounterMode(display=False) as counter:
            soft(x)
        return counter.get_total_flops()

    full = flops()
    soft.set_rank_(8)
    assert full == 2 * 8 * 32 * 64 and flops() == full // 4


def test_the_cheaper_computation_is_taken():
    soft = SoftLinear.from_linear(nn.Linear(32, 32))
    with FlopCounterMode(display=False) as counter:
        soft(torch.randn(1000, 32))
    assert counter.get_total_flops() == 2 * 32**3 + 2 * 1000 * 32 * 32  # recomposed, not 2 * 1000 * 32 * 64


def test_all_factors_and_alpha_get_gradients_and_dead_ones_none():
    soft = SoftLinear.from_linear(nn.Linear(16, 16), unit="raw")
    soft.set_rank_(5)
    soft.threshold.alpha.data.copy_(soft.sigma.sort(descending=True).values[4] * 0.99)  # inside the gate's slope
    soft(torch.randn(9, 16)).square().sum().backward()
    for parameter in (soft.U, soft.sigma, soft.V, soft.bias, soft.threshold.alpha):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert soft.sigma.grad[5:].abs().sum() == 0 and soft.U.grad[:, 5:].abs().sum() == 0


@pytest.mark.parametrize("tokens", [2, 60])
def test_gradients_of_both_computations(tokens):
    """Few tokens go through the factors, many through the recomposed W."""
    soft = SoftLinear.from_linear(nn.Linear(4, 5).double(), s=3.0)
    soft.set_rank_(3)
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)

    def output(x, U, sigma, V, alpha):
        factors = {"U": U, "sigma": sigma, "V": V, "threshold.alpha": alpha}
        return torch.func.functional_call(soft, factors, (x,))

    factors = [p.detach().clone().requires_grad_() for p in (soft.U, soft.sigma, soft.V, soft.threshold.alpha.double())]
    assert torch.autograd.gradcheck(output, (x, *factors))


def whitened(m, n, *, scale):
    """A layer, and its factors for inputs of very different size; the columns of U and V are of any length."""
    linear, size = nn.Linear(n, m), torch.logspace(-1, 1, n)
    U, sigma, Vh = torch.linalg.svd(linear.weight.detach() * size, full_matrices=False)
    return linear, (U * scale, sigma, (Vh / size).T / scale)


@given(sizes, sizes, st.integers(0, 9))
def test_lengths_of_the_factors_columns_change_nothing(m, n, seed):
    """Neither the output nor any step of an optimizer: both start as the thin layer's factors."""
    torch.manual_seed(seed)
    linear, factors = whitened(m, n, scale=1.0)
    scale = torch.logspace(-3, 3, min(m, n))
    layers = [SoftLinear.from_linear(linear, (factors[0] * c, factors[1], factors[2] / c)) for c in (1.0, scale)]
    x, wanted = torch.randn(4, n), torch.randn(4, m)
    torch.testing.assert_close(layers[0](x), linear(x), rtol=1e-3, atol=1e-4)
    for layer in layers:
        thin = LowRankLinear.from_factors(*factors, None, min(m, n))
        torch.testing.assert_close(layer.U, thin.up.weight)
        torch.testing.assert_close(layer.V, thin.down.weight.T)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        F.mse_loss(layer(x), wanted).backward()
        optimizer.step()
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-3, atol=1e-3)


def test_a_step_changes_factors_that_know_the_data_as_much_as_the_thin_layer():
    """Adam's steps are of one size: on short columns they were many times too large, on long ones too small."""
    torch.manual_seed(0)
    linear, factors = whitened(24, 16, scale=1.0)
    soft = SoftLinear.from_linear(linear, factors)
    thin = LowRankLinear.from_factors(*factors, linear.bias, 16)
    x, wanted, moved = torch.randn(64, 16), torch.randn(64, 24), []
    pairs = ((soft, [soft.U, soft.V]), (thin, [thin.up.weight, thin.down.weight]))
    for part, chosen in pairs:
        before = part.weight @ torch.eye(16)
        optimizer = torch.optim.Adam(chosen, lr=1e-3)
        F.mse_loss(part(x), wanted).backward()
        optimizer.step()
        moved.append((part.weight @ torch.eye(16) - before).norm().item())
    assert moved[0] == pytest.approx(moved[1], rel=0.05)


def test_gain_is_kept_in_float32_and_restored():
    linear, factors = whitened(12, 8, scale=1.0)
    soft = SoftLinear.from_linear(linear, factors)
    again = SoftLinear.skeleton(linear, soft.description())
    again.load_state_dict(soft.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(again(x), soft(x)) and soft.gain is not None and "gain" in dict(soft.named_buffers())
    exact = soft.gain.clone()
    assert torch.equal(soft.bfloat16().gain, exact) and soft.U.dtype == torch.bfloat16
    plain = SoftLinear.from_linear(linear)
    assert SoftLinear.from_linear(linear, svd(linear.weight)).gain is None  # the paper's own form
    assert plain.gain is None and set(plain.state_dict()) == set(soft.state_dict()) - {"gain"}
    torch.testing.assert_close(again.deployed()(x), again(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    linear = nn.Linear(24, 24)
    x = torch.randn(5, 24)
    soft = SoftLinear.from_linear(linear)
    with torch.autocast("cpu", dtype):
        assert soft(x).dtype == dtype
        torch.testing.assert_close(soft(x).float(), linear(x).float(), rtol=0.05, atol=0.05)
    half = SoftLinear.from_linear(linear.to(dtype))
    assert half.U.dtype == dtype
    torch.testing.assert_close(half(x.to(dtype)).float(), linear(x.to(dtype)).float(), rtol=0.05, atol=0.05)


def test_set_rank_moves_alpha_only_when_it_must():
    soft = SoftLinear.from_linear(nn.Linear(10, 10))
    soft.set_rank_(4)
    alpha = soft.threshold.alpha.item()
    soft.set_rank_(4)
    assert soft.threshold.alpha.item() == alpha and soft.rank == 4
    soft.set_rank_(10)
    assert soft.rank == 10
    for rank in (0, 11):
        with pytest.raises(ValueError, match="rank must be between 1 and 10"):
            soft.set_rank_(rank)


def test_projection_keeps_alpha_in_range_and_one_component_alive():
    soft = SoftLinear.from_linear(nn.Linear(10, 10))
    soft.threshold.alpha.data.fill_(-0.2)
    soft.project_()
    assert soft.threshold.alpha.item() == 0
    soft.threshold.alpha.data.fill_(1e3)
    soft.project_()
    assert soft.rank == 1


def test_projection_holds_the_rank_once_frozen():
    soft = SoftLinear.from_linear(nn.Linear(10, 10))
    soft.set_rank_(6)
    soft.freeze_()
    assert (soft.sigma == 0).sum() == 4 and not soft.threshold.alpha.requires_grad
    soft.sigma.data[5] -= 5  # a wild step
    soft.project_()
    assert soft.rank == 6 and (soft.sigma == 0).sum() == 4


@pytest.mark.parametrize("unit", ["raw", "max", "mean"])
@pytest.mark.parametrize("start", [{"alpha": 0.0}, {"alpha": 0.05}, {"rank": 7}])
@pytest.mark.parametrize("rank", [1, 4, 7, 10])
def test_a_fixed_rank_regains_what_the_threshold_took(unit, start, rank):
    """If nothing was learned, the layer is its factors, cut: also where alpha rose or fell past a component."""
    linear = nn.Linear(12, 10)
    U, sigma, V = svd(linear.weight)
    soft = SoftLinear.from_linear(linear, (U, sigma, V), unit=unit, **start)
    soft.set_rank_(rank)
    cut = (U[:, :rank] * sigma[:rank]) @ V[:, :rank].T
    before = (soft.weight - cut).norm()
    soft.freeze_()
    torch.testing.assert_close(soft.weight, cut, rtol=1e-5, atol=1e-6)
    if rank == 4:  # the threshold rose to it
        assert before > 0.01 * cut.norm()
    for again in (soft.freeze_, soft.project_):
        again()
        assert soft.rank == rank
        torch.testing.assert_close(soft.weight, cut, rtol=2e-3, atol=1e-6)


def test_sigma_of_a_fixed_rank_learn_as_a_plain_factor():
    soft = SoftLinear.from_linear(nn.Linear(10, 10))
    soft.set_rank_(6)
    soft.freeze_()
    gradient = torch.autograd.grad(soft.weight.diagonal().sum(), soft.sigma)[0]
    torch.testing.assert_close(gradient, torch.where(soft.sigma > 0, (soft.U * soft.V).sum(0), 0.0))


def test_set_rank_keeps_alpha_in_range_after_a_sigma_overshoots():
    soft = SoftLinear.from_linear(nn.Linear(10, 10))
    soft.sigma.data[9] = -0.5
    soft.threshold.alpha.data.fill_(soft.sigma[3].item())
    soft.set_rank_(9)
    soft.freeze_()
    assert soft.threshold.alpha.item() >= 0 and soft.rank == 9


def test_half_precision_compares_as_it_computes():
    sigma = torch.tensor([1.0], dtype=torch.bfloat16)
    assert SoftThreshold(alpha=0.999).is_live(sigma).all()
    assert hard_threshold(sigma, 0.999).item() == soft_threshold(sigma, 0.999, 1e6).item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_moves_no_rank(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(SoftLinear.from_linear(torch.nn.Linear(64, 64), unit="mean") for _ in range(12)))
    for rank, layer in enumerate(model, 30):
        layer.set_rank_(rank)
    sigma = [layer.sigma.detach().clone() for layer in model]
    model.to(dtype)
    assert [layer.rank for layer in model] == list(range(30, 42))
    assert all(torch.equal(layer.sigma, before) for layer, before in zip(model, sigma, strict=True))
    assert model[0].U.dtype == dtype and model(torch.ones(2, 64, dtype=dtype)).dtype == dtype
    assert model.double()[0].sigma.dtype == torch.float64


def test_a_component_of_zeros_is_no_nan():
    U, V = torch.linalg.qr(torch.randn(4, 3))[0], torch.randn(5, 3)
    V[:, 2] = 0
    layer = LowRankLinear.from_factors(U, torch.tensor([2.0, 1.0, 1e-6]), V, None, 3)
    assert all(p.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(layer.up.weight @ layer.down.weight, U * torch.tensor([2.0, 1.0, 0.0]) @ V.T)


@pytest.mark.parametrize("rank", [1, 3, 6, 7, 9])
@pytest.mark.parametrize("floor", [1.0, 1e-8, 1e-38])
def test_equal_singular_values_are_cut_by_their_order(rank, floor):
    """No threshold lies between them: a weight of random signs has many alike, a numerical floor makes them."""
    layer = SoftLinear.from_linear(nn.Linear(9, 9))
    layer.sigma.data = floor * torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    before = layer.sigma.detach().clone()
    layer.set_rank_(rank)
    assert layer.rank == rank and layer.threshold.alpha >= 0
    assert torch.equal(layer.sigma[:rank], before[:rank])
    assert len(layer.margins()) == rank and layer.deployed(dense=True).weight.isfinite().all()
    layer.freeze_()
    layer.project_()
    assert layer.rank == rank and (layer.sigma[rank:] == 0).all()


def test_neighbours_in_float32_are_told_apart():
    layer = SoftLinear.from_linear(nn.Linear(4, 4), unit="mean")
    one = torch.tensor(1.7)
    layer.sigma.data = torch.stack([one, one, torch.nextafter(one, torch.tensor(0.0)), torch.tensor(0.3)])
    for rank in (2, 3, 1):
        copied = copy.deepcopy(layer)
        copied.set_rank_(rank)
        assert copied.rank == rank
        copied.load_state_dict(copied.state_dict())
        assert copied.rank == rank


def test_sigma_that_were_cut_for_good_do_not_come_back():
    layer = SoftLinear.from_linear(nn.Linear(6, 6))
    layer.set_rank_(2)
    layer.freeze_()
    with pytest.raises(ValueError, match="rank must be at most 2, got 3: the other sigma are zero"):
        layer.set_rank_(3)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_do_not_depend_on_torchs_default(default):
    linear = nn.Linear(24, 24)
    torch.set_default_dtype(default)
    try:
        layer = SoftLinear.from_linear(linear, alpha=0.3, unit="mean")
        again = SoftLinear.skeleton(linear, layer.description())
    finally:
        torch.set_default_dtype(torch.float32)
    for made in (layer, again):
        assert made.threshold.alpha.dtype == made.threshold.unit.dtype == made.sigma.dtype == torch.float32
    assert layer.threshold.alpha == torch.tensor(0.3)
