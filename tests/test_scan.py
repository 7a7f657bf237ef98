import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from disks import make_read_only, mounted
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

import softlms
from softlms.kernels.selective_scan import fast_scan, selective_scan
from softlms.kernels.selective_scan_numba import BACKWARD_LANES, CHUNK, _exp
from softlms.utils.machine import use_threads


def inputs(batch, d, states, length, seed=0):
    torch.manual_seed(seed)
    return [
        torch.randn(batch, d, length),
        torch.rand(batch, d, length) * 0.2 + 0.001,
        -torch.rand(d, states) * 8 - 0.1,
        torch.randn(batch, states, length),
        torch.randn(batch, states, length),
    ]


def plain(u, dt, A, B, C):
    """The recurrence as the paper writes it."""
    h, y = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[2]):
        h = (dt[:, :, t, None] * A).exp() * h + dt[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        y.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(y, -1), h


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3 * CHUNK + 1))
@example(2, BACKWARD_LANES + 5, 2, CHUNK + 3)
def test_scan_and_its_gradients_are_the_plain_recurrences(batch, d, states, length):
    ours, theirs = inputs(batch, d, states, length), [x.double() for x in inputs(batch, d, states, length)]
    weight = torch.randn(batch, d, length)
    for xs in (ours, theirs):
        for x in xs:
            x.requires_grad_()
    (y, h), (expected, last) = selective_scan(*ours), plain(*theirs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.double(), last, rtol=1e-4, atol=1e-4)
    (y * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        scale = reference.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


@pytest.mark.parametrize("d", [8, BACKWARD_LANES + 5])  # a block of lanes that is not full, and two blocks
def test_threads_change_nothing(d):
    results = []
    for threads in (1, 2, 5):
        xs = [x.requires_grad_() for x in inputs(3, d, 16, 2 * CHUNK + 5)]
        with use_threads(threads):
            y, h = selective_scan(*xs)
            y.sin().sum().backward()
        results.append([y, h, *(x.grad for x in xs)])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_its_exponential_holds_what_it_says():
    @numba.njit
    def fill(xs, ys):
        for i in range(len(xs)):
            ys[i] = _exp(xs[i])

    xs = np.linspace(-87, 88, 200_001, dtype=np.float32)
    ys = np.empty_like(xs)
    fill(xs, ys)
    exact = np.exp(xs.astype(np.float64))
    assert (abs(ys - exact) <= 5e-6 * exact).all()


def test_elsewhere_than_on_a_cpu_it_is_transformers(mamba):
    model, tokens = mamba.to("meta"), torch.zeros(2, 5, dtype=torch.long, device="meta")
    with fast_scan():
        assert model(tokens).logits.shape == (2, 5, 99)


def test_it_is_one_operator_to_torch():
    xs = [x.requires_grad_() for x in inputs(2, 5, 3, CHUNK + 3)]
    over_time = [x.detach().mT.contiguous().requires_grad_() for x in xs]
    torch.library.opcheck(torch.ops.softlms.selective_scan.default, (*over_time, True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    for place in range(5):
        xs = inputs(1, 3, 2, 5)
        xs[place].view(-1)[0] = value
        y, _ = selective_scan(*xs)
        assert not y.isfinite().all()


def test_without_numba_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "softlms.kernels.selective_scan_numba")
    with pytest.raises(ImportError, match=r"pip install 'softlms\[mamba\]'"):
        selective_scan(*inputs(1, 3, 2, 5))


@pytest.fixture
def mamba():
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
    return MambaForCausalLM(config)


@pytest.mark.parametrize("padded", [False, True])
def test_mamba_is_the_same_model_with_it(mamba, padded):
    tokens = torch.randint(3, 99, (3, 2 * CHUNK + 5))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :9] = 0
    gradients = []
    for context in (None, fast_scan()):
        mamba.zero_grad()
        if context is None:
            out = mamba(tokens, attention_mask=mask, labels=tokens)
        else:
            with context:
                out = mamba(tokens, attention_mask=mask, labels=tokens)
        out.loss.backward()
        gradients.append([out.logits.detach(), *(p.grad.clone() for p in mamba.parameters())])
    for plain_, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain_, rtol=1e-3, atol=1e-5)


def test_it_keeps_float32_under_autocast():
    xs = inputs(2, 5, 3, 20)
    expected, _ = selective_scan(*xs)
    for x in xs:
        x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = selective_scan(*xs)
        y.sum().backward()
    assert torch.equal(y, expected) and all(x.grad.dtype == torch.float32 for x in xs)


def test_generation_continues_from_the_scans_state(mamba):
    mamba.eval()
    tokens = torch.randint(3, 99, (2, 9))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    expected = mamba.generate(tokens, **options)
    with fast_scan():
        assert torch.equal(mamba.generate(tokens, **options), expected)


def test_mambapy_is_taken_where_it_is_asked_for(mamba, monkeypatch):
    monkeypatch.setattr("softlms.kernels.selective_scan.selective_scan", None)
    for mixer in (layer.mixer for layer in mamba.backbone.layers):
        mixer.use_mambapy = True
    with fast_scan():
        assert mamba(torch.randint(3, 99, (2, 9))).logits.isfinite().all()


def test_it_ends_with_its_context(mamba):
    from transformers.models.mamba import modeling_mamba

    before = modeling_mamba.mamba_selective_scan
    with pytest.raises(RuntimeError, match="inside"), fast_scan():
        assert modeling_mamba.mamba_selective_scan is not before
        raise RuntimeError("inside")
    assert modeling_mamba.mamba_selective_scan is before


READ_ONLY = """
import torch
from softlms.kernels.selective_scan import selective_scan
u, dt, A, B, C = (torch.ones(1, *shape) for shape in ((4, 3), (4, 3), (4, 2), (2, 3), (2, 3)))
y, _ = selective_scan(u, dt, -A[0], B, C)
print(y.sum().item())
"""


def test_a_read_only_installation_and_home(tmp_path):
    """Numba has no folder then for what it compiles: it is compiled again, and a line says so."""
    with mounted(tmp_path / "disk", "64m") as place:
        shutil.copytree(Path(softlms.__file__).parent, place / "softlms", ignore=shutil.ignore_patterns("__pycache__"))
        make_read_only(place)
        away = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")
        environment = {name: value for name, value in os.environ.items() if name not in away}
        environment |= {"HOME": str(place), "PYTHONPATH": str(place)}
        command = [sys.executable, "-c", READ_ONLY]
        run = subprocess.run(command, cwd=place, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    # h is 1 step's input and e ** -1 of the state before it; two states, four channels
    first, fall = 1.0, math.exp(-1)
    states = [first, first + fall * first, first + fall * (first + fall * first)]
    assert float(run.stdout) == pytest.approx(8 * sum(states), rel=1e-4)
    assert "set NUMBA_CACHE_DIR to a writable folder" in run.stderr
