import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from softlms.evaluation.likelihood import Protocol, Trigram, measure_perplexity, perplexity


@pytest.fixture
def model():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).train()


@pytest.mark.parametrize("length, window, stride", [(2, 8, 4), (8, 8, 7), (29, 8, 3), (29, 8, 7), (40, 32, 1)])
def test_every_token_is_scored_once_with_its_context(model, length, window, stride):
    text = torch.randint(50, (length,))
    found = perplexity(model, text, window=window, stride=stride, batch_tokens=3 * window)
    assert model.training
    model.eval()
    expected, scored, begin = 0.0, 0, 0
    while scored < length - 1:  # one window at a time, token by token
        end = min(begin + window, length)
        with torch.no_grad():
            log_p = model(text[None, begin:end]).logits[0].log_softmax(-1)
        for t in range(scored + 1, end):
            expected -= log_p[t - 1 - begin, text[t]].item()
        scored = end - 1
        begin = min(end + stride, length) - window
    assert found == pytest.approx(math.exp(expected / (length - 1)), rel=1e-5)


@pytest.mark.parametrize("length, window", [(32, 8), (33, 8), (29, 8), (5, 8), (8, 2)])
def test_windows_that_do_not_overlap(model, length, window):
    """As papers cut a text, each piece on its own; the rest at the end is scored in a whole window."""
    text = torch.randint(50, (length,))
    found = perplexity(model, text, window=window, stride=window, batch_tokens=2 * window)
    model.eval()
    losses = []
    for begin in range(0, length, window):
        piece = text[begin : begin + window]
        seen = text[max(0, length - window) :] if len(piece) < window else piece
        with torch.no_grad():
            token = torch.nn.functional.cross_entropy(model(seen[None]).logits[0, :-1], seen[1:], reduction="none")
        losses += token[-len(piece) :].tolist()  # of a whole piece all but the first token
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_wrong_windows(model):
    for stride in (0, 9):
        with pytest.raises(ValueError, match=rf"stride must be 1 to window \(8\), got {stride}"):
            perplexity(model, [1, 2, 3], window=8, stride=stride)
    with pytest.raises(ValueError, match="window must be 2 or more, got 1"):
        perplexity(model, [1, 2, 3], window=1, stride=1)
    with pytest.raises(ValueError, match="two tokens or more, got 1"):
        perplexity(model, [1])


def test_what_is_not_finite_is_infinite(model):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e9)
    assert perplexity(model, range(20)) == math.inf
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    assert perplexity(model, range(20)) == math.inf


MARKED, UNMARKED = SimpleNamespace(bos_token_id=7), SimpleNamespace(bos_token_id=None)  # tokenizers


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "length, window, tokens", [(32, 8, None), (33, 8, None), (34, 8, 33), (40, 8, 16), (9, 9, None)]
)
def test_a_protocol_is_the_loop_that_it_says(tiny_llama, bos, length, window, tokens):
    """Window by window and token by token; batches of windows change nothing."""
    model, text = tiny_llama(), torch.randint(200, (length,))
    expected, cut = [], text[:tokens]
    for begin in range(0, len(cut), window):
        piece = [7] * bos + cut[begin : begin + window].tolist()
        for t in range(1, len(piece)):
            with torch.no_grad():
                expected.append(-model(torch.tensor([piece[:t]])).logits[0, -1].log_softmax(-1)[piece[t]].item())
    protocol = Protocol(window, bos, tokens)
    for batch_tokens in (1, 3 * window):
        found = measure_perplexity(model.train(), text.numpy(), protocol, MARKED, batch_tokens=batch_tokens)
        assert found.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
        assert found.predicted == len(expected) == len(cut) - (0 if bos else math.ceil(len(cut) / window))
        assert found.tokens == len(cut) and found.protocol == protocol and model.training
        assert str(found) == f"{found.value:.2f} ({protocol}: {found.predicted} of {found.tokens} predicted)"


def test_a_protocol_says_what_it_does(tiny_llama):
    standard = Protocol()
    assert str(standard) == (
        "windows of 1024 tokens without overlap, no BOS, first token of each not predicted, whole text"
    )
    assert str(replace(standard, bos=True, tokens=8192, bf16=True)) == (
        "windows of 1024 tokens without overlap, each after BOS, every token predicted, "
        "first 8,192 tokens of the text, bfloat16 autocast"
    )
    text = torch.randint(200, (64,))
    exact, rounded = (measure_perplexity(tiny_llama(), text, Protocol(16, bf16=bf16)).value for bf16 in (False, True))
    assert exact != rounded and exact == pytest.approx(rounded, rel=0.2)


def test_without_overlap_it_is_perplexity_with_a_stride_of_a_window(tiny_llama):
    """Where windows fit the text; `perplexity` scores the rest in a whole window."""
    model, text = tiny_llama(), torch.randint(200, (64,))
    found = measure_perplexity(model, text, Protocol(16))
    assert found.value == pytest.approx(perplexity(model, text, window=16, stride=16), rel=1e-6)


def test_what_cannot_be_measured_is_said_before_any_work(model):
    with pytest.raises(ValueError, match="window must be 2 or more, got 1: a token needs one before it"):
        Protocol(1)
    with pytest.raises(ValueError, match=r"window of 16 tokens is longer than the text's first 8\."):
        Protocol(16, tokens=8)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        Protocol(16, tokens=0)
    for protocol, length, message in (
        (Protocol(8), 0, "The text has no tokens"),
        (Protocol(8), 7, "window of 8 tokens is longer than the text, which has 7"),
        (Protocol(8, tokens=20), 19, r"The text has 19 tokens, not 20: ask for fewer, or for all \(None\)"),
        (Protocol(33), 40, "window of 33 tokens is longer than the 32 that the model reads"),
        (Protocol(8, bos=True), 8, "The tokenizer has no BOS token: set bos=False"),
    ):
        for tokenizer in (None, UNMARKED):
            with pytest.raises(ValueError, match=message):
                measure_perplexity(model, [1] * length, protocol, tokenizer)
    assert (
        measure_perplexity(model, [1] * 64, Protocol(32, bos=True), MARKED).predicted == 64
    )  # all that the model reads
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    assert measure_perplexity(model, range(20), Protocol(8)).value == math.inf


def kneser_ney(text, vocabulary, d):
    """As in the textbook, with dictionaries: P(w | u, v)."""
    tri = {}
    for u, v, w in zip(text, text[1:], text[2:], strict=False):
        tri[u, v, w] = tri.get((u, v, w), 0) + 1
    # every bigram counts once for each word seen before it; the opening one has the text's start there
    bi = {}
    for pair in set(pairwise(text)):
        bi[pair] = len({u for (u, v, w) in tri if (v, w) == pair}) + (pair == tuple(text[:2]))
    uni = [len({v for (v, w) in bi if w == word}) for word in range(vocabulary)]

    def p1(w):
        return (max(uni[w] - d, 0) + d * sum(n > 0 for n in uni) / vocabulary) / sum(uni)

    def p2(v, w):
        total = sum(n for (a, _), n in bi.items() if a == v)
        types = sum(a == v for a, _ in bi)
        return (max(bi.get((v, w), 0) - d, 0) + d * types * p1(w)) / total if total else p1(w)

    def p3(u, v, w):
        total = sum(n for (a, b, _), n in tri.items() if (a, b) == (u, v))
        types = sum((a, b) == (u, v) for a, b, _ in tri)
        return (max(tri.get((u, v, w), 0) - d, 0) + d * types * p2(v, w)) / total if total else p2(v, w)

    return p3


@given(st.lists(st.integers(0, 4), min_size=3, max_size=40), st.lists(st.integers(0, 4), min_size=3, max_size=12))
def test_trigram_is_kneser_ney_and_sums_to_one(text, other):
    model, p3 = Trigram(text, 5), kneser_ney(text, 5, 0.75)
    expected = [p3(*context) for context in zip(other, other[1:], other[2:], strict=False)]
    assert model.perplexity(other) == pytest.approx(np.exp(-np.log(expected).mean()), rel=1e-9)
    u, v = other[:2]
    assert sum(1 / model.perplexity([u, v, w]) for w in range(5)) == pytest.approx(1)


def test_trigram_learns():
    rng = np.random.default_rng(0)
    cycle = np.tile(np.arange(20), 200)
    assert Trigram(cycle, 20).perplexity(cycle) < 1.02
    noise = Trigram(rng.integers(20, size=5000), 20).perplexity(rng.integers(20, size=1000))
    assert noise == pytest.approx(20, rel=0.3)
