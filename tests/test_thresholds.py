import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlms.thresholds import SoftThreshold, hard_threshold, inverse_soft_threshold, shifted_tanh, soft_threshold

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
alphas = st.floats(0, 10)
sharpnesses = st.floats(1e-3, 1e6)


@given(shapes, st.sampled_from(DTYPES), alphas, sharpnesses, st.integers(0, 100))
def test_soft_threshold_lies_between_zero_and_sigma(shape, dtype, alpha, s, seed):
    sigma = (10 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    t = soft_threshold(sigma, alpha, s)
    assert t.shape == sigma.shape and t.dtype == dtype
    assert (t >= 0).all() and (t <= sigma).all()
    assert (t[sigma <= alpha] == 0).all()


@given(alphas, sharpnesses)
def test_soft_threshold_rises_with_sigma_and_falls_with_alpha(alpha, s):
    sigma = torch.linspace(0, 20, 501, dtype=torch.float64)
    t = soft_threshold(sigma, alpha, s)
    assert (t.diff() >= 0).all()
    assert (soft_threshold(sigma, alpha + 0.5, s) <= t).all()


def test_soft_threshold_tends_to_the_hard_threshold():
    sigma = torch.linspace(0, 5, 1000, dtype=torch.float64)
    hard = hard_threshold(sigma, 1.0)
    errors = [(soft_threshold(sigma, 1.0, s) - hard).abs().sum().item() for s in (1, 10, 100, 1e3, 1e9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize("function", [soft_threshold, shifted_tanh])
def test_gradients(function):
    sigma = torch.tensor([0.05, 0.4, 0.9, 1.02, 1.1, 3.0], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: function(x, a, 5.0), (sigma, alpha))
    assert torch.autograd.gradgradcheck(lambda x, a: function(x, a, 5.0), (sigma, alpha))


def test_gradients_are_the_published_formulas():
    s = 7.0
    sigma = torch.linspace(0.5, 2, 9, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    soft_threshold(sigma, alpha, s).sum().backward()
    u = s * (sigma - alpha).detach()
    live, sech2 = sigma.detach() > 1, 1 / torch.cosh(u) ** 2
    torch.testing.assert_close(sigma.grad, live * (torch.tanh(u) + s * sigma.detach() * sech2))
    torch.testing.assert_close(alpha.grad, (live * -s * sigma.detach() * sech2).sum())


def test_convention_at_sigma_equal_alpha_is_zero_value_and_zero_gradients():
    sigma = torch.tensor([1.0], requires_grad=True)
    alpha = torch.tensor(1.0, requires_grad=True)
    t = soft_threshold(sigma, alpha, 50.0)
    t.sum().backward()
    assert t.item() == 0 and sigma.grad.item() == 0 and alpha.grad.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1e-300, 1e-3, 50.0, 1e5, 1e38, 1e308])
def test_no_nan_for_extreme_sharpness(dtype, s):
    sigma = torch.tensor([0.0, 1e-6, 1.0, 1.0001, 3.0, 6e4], dtype=dtype, requires_grad=True)
    alpha = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    t = soft_threshold(sigma, alpha, s)
    t.sum().backward()
    assert t.isfinite().all() and sigma.grad.isfinite().all() and alpha.grad.isfinite()


def test_under_autocast():
    sigma = torch.linspace(0, 3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        t = soft_threshold(sigma, 1.0, 50.0)
    torch.testing.assert_close(t, soft_threshold(sigma, 1.0, 50.0), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    sigma = torch.rand(1000) * 3
    torch.testing.assert_close(soft_threshold(sigma.cuda(), 1.0, 50.0).cpu(), soft_threshold(sigma, 1.0, 50.0))


@given(st.floats(0, 3), st.floats(0.1, 1e4), st.sampled_from([torch.float32, torch.float64]))
def test_inverse_undoes_the_threshold(alpha, s, dtype):
    t = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 1.0, 7.0], dtype=dtype)
    sigma = inverse_soft_threshold(t, alpha, s)
    assert (sigma >= alpha * (1 - 1e-6)).all()
    # near alpha T is as steep as 1 + s sigma, so it magnifies the rounding of sigma by that much
    slack = 4 * torch.finfo(dtype).eps * sigma.max().item() * (1 + s * sigma.max().item())
    assert (soft_threshold(sigma, alpha, s) - t).abs().max().item() <= slack


def test_unit_scales_sigma_and_output_alike():
    sigma = torch.rand(50) * 8
    raw, relative = SoftThreshold(alpha=2.0, s=25.0), SoftThreshold(alpha=0.5, s=100.0, unit=4.0)
    torch.testing.assert_close(raw(sigma), relative(sigma))
    assert torch.equal(raw.is_live(sigma), relative.is_live(sigma))


@pytest.mark.parametrize("alpha", [-1, -1e-9, math.nan, math.inf])
def test_wrong_alpha(alpha):
    for call in (lambda: soft_threshold(torch.ones(2), alpha, 1.0), lambda: SoftThreshold(alpha=alpha)):
        with pytest.raises(ValueError, match="alpha must be at least 0"):
            call()


@pytest.mark.parametrize("s", [0, -50, math.inf, math.nan])
def test_wrong_sharpness(s):
    for call in (lambda: soft_threshold(torch.ones(2), 1.0, s), lambda: SoftThreshold(s=s)):
        with pytest.raises(ValueError, match="s must be a positive finite number"):
            call()


def test_integer_sigma_and_wrong_unit():
    with pytest.raises(TypeError, match=r"sigma\.float\(\)"):
        soft_threshold(torch.arange(3), 1.0, 1.0)
    with pytest.raises(ValueError, match="unit"):
        SoftThreshold(unit=0)
