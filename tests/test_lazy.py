"""A weight that is multiplied when it is used, and only then."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

import softlms
from softlms.kernels.lazy import lazy_product
from softlms.layers import LowRankLinear, SoftLinear


def gradients(value, *factors):
    return torch.autograd.grad(value.sin().sum(), factors)


class Kernel(torch.autograd.Function):
    """As Mamba's fused ones: outside torch's own dispatch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


@pytest.mark.parametrize("use", [F.linear, Kernel.apply, lambda x, w: x @ w.T.contiguous(), lambda x, w: x @ w.data.T])
def test_values_and_gradients_are_those_of_the_product(use):
    left, right, x = torch.randn(5, 2, requires_grad=True), torch.randn(2, 7, requires_grad=True), torch.randn(3, 7)
    lazy, plain = lazy_product(left, right), left @ right
    assert (lazy.shape, lazy.dtype, lazy.device) == (plain.shape, plain.dtype, plain.device)
    torch.testing.assert_close(use(x, lazy), use(x, plain))
    if use(x, plain).requires_grad:
        torch.testing.assert_close(gradients(use(x, lazy), left, right), gradients(use(x, plain), left, right))
    assert torch.equal(lazy.detach(), plain) and torch.equal(lazy.bfloat16(), plain.bfloat16())


def test_to_ask_for_its_kind_costs_nothing():
    layer = LowRankLinear(torch.randn(3, 40), torch.randn(50, 3), None)
    soft = SoftLinear.from_linear(torch.nn.Linear(40, 50))
    with FlopCounterMode(display=False) as counter:
        for weight in (layer.weight, soft.weight):
            assert weight.dtype == torch.float32 and weight.shape == (50, 40) and isinstance(weight, torch.Tensor)
            assert weight.device.type == "cpu" and weight.requires_grad
    assert counter.get_total_flops() == 0


def test_t5_computes_no_more_than_its_factors():
    """Its feed-forward reads wo.weight.dtype at each call."""
    config = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=200)
    model, ids = T5EncoderModel(config).eval(), torch.randint(5, 200, (2, 8))

    def feed_forward(name, module):
        return name.endswith((".wi", ".wo"))

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
        return counter.get_total_flops()

    dense, rank = flops(), 6
    softlms.truncate(model, {t.name: rank for t in softlms.find_targets(model, feed_forward)}, targets=feed_forward)
    assert flops() == dense - 4 * 2 * 16 * (32 * 64 - rank * (32 + 64))
    assert model.to(torch.bfloat16)(ids).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compilers_and_tracers_see_the_plain_product():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wo = LowRankLinear(torch.randn(3, 8), torch.randn(6, 3), None)

        def forward(self, x):
            return self.wo(x.to(self.wo.weight.dtype)) + x @ self.wo.weight.T

    block, x = Block(), torch.randn(4, 8)
    for made in (
        torch.compile(block, backend="eager", fullgraph=True),
        torch.jit.trace(block, (x,)),
        torch.export.export(block, (x,)).module(),
    ):
        torch.testing.assert_close(made(x), block(x))
