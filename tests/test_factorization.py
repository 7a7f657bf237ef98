import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from softlms.lowrank.calibration import LayerStatistics
from softlms.lowrank.cliff import loss_increase
from softlms.lowrank.factorization import DAMPING, FACTORIZATIONS, factorize, factorize_weight
from softlms.surgery import decompose, truncate

SHAPES = [(12, 12), (24, 10), (10, 24)]


def statistics(shape, tokens=200, seed=0):
    """Correlated inputs and gradients, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)

    def moments(size):
        values = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
        values = values @ torch.randn(size, size, generator=generator, dtype=torch.float64)
        return values, values.T @ values / tokens

    x, gram = moments(shape[1])
    fisher = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 1e-3
    return x, LayerStatistics(gram, x.abs().mean(0), fisher, moments(shape[0])[1])


def damped(gradient):
    relative = gradient / gradient.diagonal().mean()
    return (relative + DAMPING * torch.eye(len(gradient))) / (1 + DAMPING)


def cut(factors, rank):
    return factors.U[:, :rank] * factors.sigma[:rank] @ factors.V[:, :rank].T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", FACTORIZATIONS)
@pytest.mark.parametrize("tokens", [200, 4])
def test_all_components_together_are_the_weight(shape, method, tokens):
    """Also where G has a lower rank than the layer has inputs."""
    W = torch.randn(shape)
    factors = factorize_weight(W, method, statistics(shape, tokens)[1])
    r = min(shape)
    assert (factors.U.shape, factors.sigma.shape, factors.V.shape) == ((shape[0], r), (r,), (shape[1], r))
    torch.testing.assert_close(cut(factors, r), W, rtol=1e-5, atol=1e-5)
    if method != "kfac":
        torch.testing.assert_close(factors.U.T @ factors.U, torch.eye(r), rtol=0, atol=1e-5)
    assert (factors.sigma > 0).all() and (factors.sigma.diff() <= 0).all()


@pytest.mark.parametrize("method", FACTORIZATIONS[1:])
def test_sigma_are_the_singular_values_of_the_weighed_weight(method):
    known = statistics((24, 10))[1]
    W = torch.randn(24, 10, dtype=torch.float64)
    root = torch.linalg.cholesky(known.gram)
    left = torch.linalg.cholesky(damped(known.gradient)).T if method == "kfac" else torch.eye(24, dtype=torch.float64)
    weighed = {
        "fwsvd": W * known.fisher.sqrt(),
        "asvd": W * (known.mean_abs.sqrt() + 1e-6),
        "whitened": W @ root,
        "kfac": left @ W @ root,
    }[method]
    factors = factorize_weight(W, method, known)
    torch.testing.assert_close(factors.sigma, torch.linalg.svdvals(weighed))
    # the published form: SVD of W S, the right factor times the inverse of S
    U, sigma, Vh = torch.linalg.svd(weighed, full_matrices=False)
    inverse = {
        "fwsvd": lambda v: v / known.fisher.sqrt(),
        "asvd": lambda v: v / (known.mean_abs.sqrt() + 1e-6),
    }.get(method, lambda v: torch.linalg.solve(root.T, v.T).T)
    published = torch.linalg.solve(left, U[:, :4] * sigma[:4]) @ inverse(Vh[:4])
    torch.testing.assert_close(cut(factors, 4), published, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tokens", [200, 6])
def test_no_descent_finds_a_lower_activation_error_than_whitening(tokens):
    """Float64, independent of every closed form: LBFGS over both factors, from random starts and from the solution."""
    x, known = statistics((14, 10), tokens)
    W, rank = torch.randn(14, 10, dtype=torch.float64), 3
    factors = factorize_weight(W, "whitened", known)
    ours = ((W - cut(factors, rank)) @ x.T).norm().item()
    for start in range(5):
        up, down = torch.randn(14, rank, dtype=torch.float64), torch.randn(rank, 10, dtype=torch.float64)
        if start == 0:
            up = factors.U[:, :rank].clone(memory_format=torch.contiguous_format)
            down = (up.T @ W).contiguous()
        up.requires_grad_(True)
        down.requires_grad_(True)
        optimizer = torch.optim.LBFGS([up, down], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def loss(up=up, down=down, optimizer=optimizer):
            optimizer.zero_grad()
            value = ((W - up @ down) @ x.T).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        assert ours <= loss().sqrt().item() * (1 + 1e-6) + 1e-9
    # what is left is what sigma says: the root of the sum of the squares that were cut
    assert ours == pytest.approx((factors.sigma[rank:].square().sum() * len(x)).sqrt().item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 6])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_whitening_is_the_svd_of_the_outputs_also_with_massive_inputs(shape, tokens, offset):
    """One channel is a thousand times the others, or all are far from zero in a direction that the weight ignores."""
    x, W = torch.randn(tokens, shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    if offset:
        W -= W.mean(1, keepdim=True)
        x += offset
    else:
        x[:, 0] *= 1e3
    factors = factorize_weight(W, "whitened", LayerStatistics(x.T @ x / tokens, x.abs().mean(0)))
    energy = torch.linalg.svdvals(x @ W.T).square()
    for rank in range(1, min(shape) + 1):
        error = ((W - cut(factors, rank)) @ x.T).square().sum()
        assert error <= energy[rank:].sum() + 1e-9 * energy.sum()


@given(rank=st.integers(1, 9), seed=st.integers(0, 50), tokens=st.integers(1, 40))
def test_kfac_beats_the_others_where_gradients_say_what_counts(rank, seed, tokens):
    known = statistics((16, 10), tokens, seed)[1]
    W = torch.randn(16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    judged = LayerStatistics(known.gram, known.mean_abs, None, damped(known.gradient))
    errors = {m: loss_increase(factorize_weight(W, m, known), judged, kfac=True)[rank] for m in FACTORIZATIONS}
    assert errors["kfac"] <= min(errors.values()) * (1 + 1e-6) + 1e-9


@given(rank=st.integers(1, 9), seed=st.integers(0, 50), tokens=st.integers(1, 40))
def test_whitening_beats_the_others_on_activations_and_svd_on_weights(rank, seed, tokens):
    x, known = statistics((16, 10), tokens, seed)
    W = torch.randn(16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    errors = {}
    for method in FACTORIZATIONS:
        difference = W - cut(factorize_weight(W, method, known), rank)
        errors[method] = ((difference @ x.T).norm().item(), difference.norm().item())
    assert errors["whitened"][0] <= min(error for error, _ in errors.values()) * (1 + 1e-9) + 1e-5
    assert errors["svd"][1] <= min(error for _, error in errors.values()) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("method", FACTORIZATIONS)
def test_verbs_take_every_factorization(tiny_bert, tokens, method):
    model = tiny_bert()
    known = {name: statistics(shape)[1] for name, shape in shapes(model).items()}
    with torch.no_grad():
        dense = model(tokens).logits
        factors = factorize(model, method, known)
        torch.testing.assert_close(decompose(tiny_clone(model), factors)(tokens).logits, dense, rtol=0, atol=1e-4)
        torch.testing.assert_close(decompose(tiny_clone(model), method, known)(tokens).logits, dense, rtol=0, atol=1e-4)
        ranks = dict.fromkeys(factors, 5)
        one = truncate(tiny_clone(model), ranks, factors)(tokens).logits
        two = truncate(tiny_clone(model), ranks, method, known)(tokens).logits
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, dense, atol=1e-3)


def test_training_does_not_change_the_factors_given(tiny_bert, tokens):
    model = tiny_bert()
    factors = factorize(model)
    before = {name: f.U.clone() for name, f in factors.items()}
    decompose(model, factors)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(f.U, before[name]) for name, f in factors.items())


def test_bad_input_is_refused_before_anything_changes(tiny_bert):
    model = tiny_bert()
    known = {name: statistics(shape)[1] for name, shape in shapes(model).items()}
    with pytest.raises(ValueError, match="Unknown factorization 'pca'; known: svd, fwsvd, asvd, whitened, kfac"):
        decompose(model, "pca", known)
    with pytest.raises(ValueError, match=r"'whitened' needs statistics=softlms.calibrate\(model, rows, collator\)"):
        decompose(model, "whitened")
    whole, blind = dict(known), {name: LayerStatistics(k.gram, k.mean_abs) for name, k in known.items()}
    with pytest.raises(ValueError, match="fisher=True"):
        factorize(model, "fwsvd", blind)
    with pytest.raises(ValueError, match="'kfac' needs statistics=.*gradient_rows="):
        factorize(model, "kfac", blind)
    name = "bert.encoder.layer.1.output.dense"
    del known[name]
    with pytest.raises(ValueError, match=f"{name} is missing from the statistics"):
        truncate(model, dict.fromkeys(shapes(model), 3), "asvd", known)
    factors = factorize(model)
    other = factorize(tiny_bert(hidden_size=16))
    for wrong in ({k: f for k, f in factors.items() if k != name}, factors | {name: other[name]}):
        with pytest.raises(ValueError, match=f"factors lack {name}, or have another shape"):
            decompose(model, wrong)
    with pytest.raises(ValueError, match="all zero"):
        factorize_weight(torch.ones(3, 3), "whitened", LayerStatistics(torch.zeros(3, 3).double(), torch.zeros(3)))
    silent = "bert.encoder.layer.0.output.dense"
    unseen = {
        n: LayerStatistics(0 * k.gram if n == silent else k.gram, k.mean_abs, None, k.gradient)
        for n, k in whole.items()
    }
    with pytest.raises(ValueError, match=f"statistics of {silent} are all zero"):
        decompose(model, "kfac", unseen)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in factors)


def shapes(model):
    from softlms.architectures import find_targets

    return {target.name: target.shape for target in find_targets(model)}


def tiny_clone(model):
    import copy

    return copy.deepcopy(model)
