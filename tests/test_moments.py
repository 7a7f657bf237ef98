import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from softlms.lowrank.moments import Moments, SharedMoments


def inputs(kind, tokens, n):
    """As language models have them: a channel far from zero, a constant one, one a thousand times the others."""
    x = torch.randn(tokens, n)
    if kind == "mean":
        return x * 0.1 + torch.linspace(-5, 5, n)
    if kind == "massive":
        x[:, 0] *= 1000
    if kind == "constant":
        x[:, 0] = 1000 / 3
    if kind == "first token":  # the same in every text, and huge
        x[::128] = 3000 * torch.linspace(-1, 1, n)
    return x


@pytest.mark.parametrize("kind", ["normal", "mean", "massive", "constant", "first token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_are_those_of_float64(kind, dtype):
    x = inputs(kind, 5000, 37).to(dtype)
    sums, wide = Moments.of(x), x.double()
    expected = wide.T @ wide
    scale = expected.diagonal().sqrt()
    assert ((sums.gram - expected).abs() / torch.outer(scale, scale)).max() < 1e-12
    assert (sums.gram - expected).norm() < 1e-12 * expected.norm()
    torch.testing.assert_close(sums.absolute, wide.abs().sum(0), rtol=1e-12, atol=0)
    assert sums.tokens == 5000


@given(tokens=st.integers(0, 9), n=st.integers(1, 23))
def test_sums_of_every_shape(tokens, n):
    x = torch.randn(tokens, n)
    sums, wide = Moments.of(x), x.double()
    torch.testing.assert_close(sums.gram, wide.T @ wide)
    assert torch.equal(sums.gram, sums.gram.T)
    torch.testing.assert_close(sums.absolute, wide.abs().sum(0))


def test_neither_autocast_nor_a_lower_precision_changes_the_sums():
    x = inputs("mean", 300, 8)
    expected, before = Moments.of(x), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(Moments.of(x).gram, expected.gram)
    finally:
        torch.set_float32_matmul_precision(before)


class Reader(nn.Module):
    """Layers a, b, c and d, called as `reads` says: with x, a copy of it, or x changed in place."""

    def __init__(self, reads):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 2) for name in "abcd"})
        self.reads = reads

    def forward(self, x):
        for name, how in self.reads:
            if how == "copy":
                self.layers[name](x.clone())
            else:
                self.layers[name](x.add_(1) if how == "changed" else x)


def watch(model, *batches):
    moments, seen = SharedMoments(), {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, n=n: seen.setdefault(n, []).append(args[0].clone()))
        for n, layer in model.layers.items()
    ]
    with torch.no_grad():
        for x, reads in batches:
            model.reads = reads
            with moments.watching(model.layers, None):
                model(x)
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_pre_hooks for layer in model.layers.values())
    means = moments.means()
    for name, tensors in seen.items():
        x = torch.cat(tensors).double()
        torch.testing.assert_close(means[name][0], x.T @ x / len(x))
        torch.testing.assert_close(means[name][1], x.abs().mean(0))
    assert means.keys() == seen.keys()
    return {a + b for a in means for b in means if a < b and means[a][0] is means[b][0]}


@pytest.mark.parametrize(
    "reads, shared",
    [
        ([("a", ""), ("b", ""), ("c", ""), ("d", "copy")], {"ab", "ac", "bc"}),
        ([("a", ""), ("b", "changed"), ("c", ""), ("d", "copy")], {"bc"}),
        ([("a", ""), ("b", ""), ("a", ""), ("c", "changed")], set()),  # a runs twice
        ([("a", "copy"), ("b", "copy")], set()),
        ([("a", ""), ("b", "copy"), ("c", "")], set()),  # would be right to share, but is not seen
    ],
)
def test_layers_share_what_is_one_unchanged_tensor(reads, shared):
    assert watch(Reader([]), *((torch.randn(5, 6), reads) for _ in range(3))) == shared


def test_layers_that_share_in_some_batches_only_have_sums_of_their_own():
    def batches(*patterns):
        return [(torch.randn(4 + i, 6), reads) for i, reads in enumerate(patterns)]

    abc = [("a", ""), ("b", ""), ("c", "")]
    parted = [("a", ""), ("b", ""), ("c", "changed")]
    assert watch(Reader([]), *batches(abc, parted, abc)) == {"ab"}
    assert watch(Reader([]), *batches(parted, abc)) == {"ab"}
    assert watch(Reader([]), *batches(abc, abc[:2])) == {"ab"}  # c is not reached
    assert watch(Reader([]), *batches(abc, abc[:1], abc[1:])) == {"bc"}
    assert watch(Reader([]), *batches(abc, abc[1:], abc[:1])) == {"bc"}


def test_tensors_of_one_address_are_not_mistaken():
    """The first is freed when the second is made."""
    model, moments = Reader([]), SharedMoments()
    with torch.no_grad(), moments.watching(model.layers, None):
        for name in "abcd":
            model.layers[name](torch.full((3, 6), float(ord(name))))
    means = moments.means()
    assert [means[name][1][0].item() for name in "abcd"] == [97, 98, 99, 100]
