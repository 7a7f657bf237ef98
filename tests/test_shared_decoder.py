"""Linears stored in few bytes: each codec to the byte, the shared decoder, saving and loading."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import softlms
from softlms.experiments.recipe import Recipe
from softlms.lowrank.calibration import LayerStatistics
from softlms.methods.shared_decoder.autoencoder import SharedDecoder, row_loss
from softlms.methods.shared_decoder.codecs import Source
from softlms.methods.shared_decoder.module import CODECS, StoredLinear
from softlms.methods.shared_decoder.surgery import store_linears, stored_bytes

TEXT = torch.randint(5, 99, (2, 11), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.2}
FAMILIES = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SIZES)), AutoModelForSequenceClassification),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)),
        AutoModelForCausalLM,
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), AutoModelForCausalLM),
}
FEW = SharedDecoder(epochs=0.5)


def dense(family="llama"):
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def outputs(model):
    with torch.no_grad():
        return model(TEXT).logits


def inputs(model):
    return {
        target.name: LayerStatistics(torch.eye(target.shape[1], dtype=torch.float64), torch.ones(target.shape[1]))
        for target in softlms.find_targets(model)
    }


def stored(family="llama", times=4.0, codec="few-bits", **options):
    model = dense(family)
    if codec == "shared-decoder":
        codec = FEW
    return store_linears(model, times, codec, statistics=inputs(model), **options)


def bytes_on_disk(folder):
    """Of stored weights, read from the headers of the files alone."""
    total, shared = 0, 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith((".own", ".shared")):
                    part = tensors.get_slice(name)
                    assert part.get_dtype() == "U8"
                    total += math.prod(part.get_shape())
                    shared += name.endswith(".shared") and bool(part.get_shape()[0])
    return total, shared


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_on_disk_are_at_most_the_target_and_the_model_comes_back_bit_for_bit(family, codec, tmp_path):
    model = stored(family, codec=codec)
    model.save_pretrained(tmp_path)
    on_disk, shared = bytes_on_disk(tmp_path)
    kinds = {}
    for target in softlms.find_targets(dense(family)):
        kinds.setdefault(target.symbol, []).append(math.prod(target.shape))
    assert on_disk == stored_bytes(model) <= sum(int(4 * sum(sizes) / 4.0) for sizes in kinds.values())
    assert shared == (len(kinds) if codec in ("shared-decoder", "shared-svd") else 0)
    again = FAMILIES[family][1].from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    again.save_pretrained(tmp_path / "again")
    assert bytes_on_disk(tmp_path / "again")[0] == on_disk
    half = FAMILIES[family][1].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(TEXT).logits.dtype == torch.bfloat16
    assert {m.decoded.dtype for m in half.modules() if isinstance(m, StoredLinear)} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    assert bytes_on_disk(tmp_path / "half")[0] == on_disk


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    m=st.integers(4, 40),
    n=st.integers(4, 40),
    count=st.integers(1, 4),
    times=st.floats(1.5, 12),
    seed=st.integers(0, 99),
)
def test_no_codec_takes_more_than_its_bytes_nor_asks_for_more_than_it_needs(codec, m, n, count, times, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(m, n, generator=generator) for _ in range(count)]
    source = Source(weights, [torch.eye(n, dtype=torch.float64)] * count, seed)
    method = SharedDecoder(epochs=0.1) if codec == "shared-decoder" else CODECS[codec]()
    least = method.least(count, (m, n))
    for limit in (least, max(least, int(4 * count * m * n / times))):
        encoded = method.encode(source, limit)
        assert encoded.bytes <= limit and {part.dtype for part in (encoded.shared, *encoded.own)} == {torch.uint8}
        for number, own in enumerate(encoded.own):
            settings_ = json.loads(json.dumps(encoded.settings[number]))
            W = method.decode(encoded.shared, own, settings_, (m, n))
            assert W.shape == (m, n) and W.isfinite().all()


def error(codec, weights, limit, **options):
    source = Source(weights, options.pop("grams", None))
    method = SharedDecoder(**options) if codec == "shared-decoder" else CODECS[codec]()
    encoded = method.encode(source, limit)
    decoded = [
        method.decode(encoded.shared, own, s, source.shape)
        for own, s in zip(encoded.own, encoded.settings, strict=True)
    ]
    return sum((a - b).square().sum() for a, b in zip(weights, decoded, strict=True)).item()


def test_svd_is_exact_to_half_precision_where_the_rank_suffices_and_whitened_is_svd_on_white_inputs():
    weights = [torch.randn(20, 4) @ torch.randn(4, 30) for _ in range(2)]
    limit = 2 * 2 * 50 * 4
    scale = sum(W.square().sum() for W in weights).item()
    assert error("svd", weights, limit) < 1e-5 * scale
    white = [torch.eye(30, dtype=torch.float64)] * 2
    for few in (limit // 2, limit):
        one, other = error("svd", weights, few), error("whitened-svd", weights, few, grams=white)
        assert other == pytest.approx(one, rel=1e-2, abs=1e-5 * scale)


def test_kronecker_is_exact_for_a_kronecker_product_and_pruning_for_a_sparse_matrix():
    codec = CODECS["kronecker"]()
    (a, b), (c, d) = codec._split((24, 20))
    product = torch.kron(torch.randn(a, b), torch.randn(c, d))
    assert error("kronecker", [product], codec.least(1, (24, 20))) < 1e-5 * product.square().sum()
    sparse = torch.zeros(16, 16)
    sparse.view(-1)[torch.randperm(256)[:30]] = torch.randn(30)
    assert error("pruned", [sparse], 256 // 8 + 2 * 30) < 1e-5 * sparse.square().sum()


@pytest.mark.parametrize("bits", range(1, 9))
def test_few_bits_are_off_by_half_a_step_at_most(bits):
    W = torch.randn(7, 96)  # two groups of 48 in a row
    codec = CODECS["few-bits"]()
    limit = codec._bytes((7, 96), bits)
    encoded = codec.encode(Source([W]), limit)
    assert encoded.settings == [{"bits": bits}] and encoded.bytes == limit
    groups = W.view(-1, 48)
    off = codec.decode(encoded.shared, encoded.own[0], {"bits": bits}, (7, 96)).view(-1, 48) - groups
    step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
    whole = step.square() * 48 / 4 * 1.05  # of a range that leaves no entry out: half a step for each at most
    assert (off.square().sum(1) <= whole + 1e-4).all()


def test_further_bits_go_where_they_save_most():
    codec = CODECS["few-bits"]()
    weights = [torch.randn(8, 64) * scale for scale in (0.1, 3.0, 1.0)]
    sizes = [codec._bytes((8, 64), bits) for bits in (2, 3)]
    encoded = codec.encode(Source(weights), 2 * sizes[0] + sizes[1])
    assert encoded.settings == [{"bits": 2}, {"bits": 3}, {"bits": 2}]


def test_layers_go_on_sharing_their_bytes_when_the_model_moves(tmp_path):
    model = stored(codec="shared-decoder")
    before, expected = stored_bytes(model), outputs(model)
    model._apply(lambda values: values.clone())
    assert stored_bytes(model) == before
    model.to(torch.float64).to(torch.float32)
    model.save_pretrained(tmp_path)
    assert bytes_on_disk(tmp_path)[0] == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert stored_bytes(again) == before
    torch.testing.assert_close(outputs(again), expected)


def curved(count=3, m=512, n=32, seed=0):
    """Rows on a curved surface of two dimensions that all matrices share: a linear decoder needs many more."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randn(8, n, generator=generator)
    made = []
    for _ in range(count):
        angles = 3 * torch.rand(m, 2, generator=generator)
        waves = [torch.sin(k * angles) for k in (1, 2)] + [torch.cos(k * angles) for k in (1, 2)]
        made.append(torch.cat(waves, dim=1) @ ways)
    return made


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_a_shared_curved_surface_the_decoder_beats_a_shared_svd(seed):
    weights = curved(seed=seed)
    codec = SharedDecoder()
    limit = codec._bytes(4, 3, (512, 32))
    learned, linear = error("shared-decoder", weights, limit), error("shared-svd", weights, limit)
    assert learned < 0.7 * linear


def test_the_loss_is_the_formula_and_its_gradient_is_right():
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert row_loss(one, other).item() == pytest.approx(0.9091 * (1 - 24 / 25) + 0.0909 * 1.0, rel=1e-4)
    assert row_loss(one, 2 * one, cosine=1.0).item() == pytest.approx(0, abs=1e-6)
    a, b = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(row_loss, (a, b))


def test_decoded_rows_have_their_stored_length_and_a_seed_gives_the_same_bytes():
    weights = curved()
    codec = SharedDecoder(epochs=1)
    one, other = (codec.encode(Source(weights, seed=3), 8000) for _ in range(2))
    assert torch.equal(one.shared, other.shared)
    W = codec.decode(one.shared, one.own[0], one.settings[0], (512, 32))
    torch.testing.assert_close(W.norm(dim=1), weights[0].norm(dim=1), rtol=1e-3, atol=0)
    assert F.cosine_similarity(W, weights[0], dim=1).mean() > 0


def test_together_shares_one_decoder_of_a_kind_and_alone_each_has_its_own(tmp_path):
    for together, decoders in ((True, 1), (False, 3)):
        model = stored(codec="shared-decoder", symbols=["W_up"], together=together)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, StoredLinear)}
        assert len(layers) == 3 and all("up_proj" in name for name in layers)
        assert len({layer.shared.data_ptr() for layer in layers.values()}) == decoders


def test_it_counts_whole_and_runs_beside_what_is_left():
    model = stored(symbols=["W_up"])
    count = softlms.count_parameters(model)
    assert count.kept("linear") == count.kept("total") == 1
    assert isinstance(model.model.layers[0].mlp.gate_proj, nn.Linear)
    model.train()(TEXT, labels=TEXT).loss.backward()


@pytest.mark.parametrize("method", ["shared-decoder", "stored-whitened-svd", "stored-few-bits"])
def test_it_is_a_method_of_chains(bench, method):
    own = {method: {"times": 4.0, "fit_epochs": 0.02, "calibration_rows": 16}}
    run = bench.run(method, Recipe(dense_epochs=1, epochs=1, settings=own), 0).result
    whole = 4 * sum(math.prod(shape) for shape in bench.targets().values())
    assert 0 < run["bytes"] <= whole / 4 and "dev" in run["untuned"] and run["steps"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "zip"}, "codec must be one of 'shared-decoder', .* got 'zip'"),
        ({"times": 0}, "times must be"),
        ({"times": 1e4}, r"times=10000.0 leaves 1 bytes for the 3 layers like .*q_proj, and few-bits needs .*at most"),
        ({"symbols": ["W_fc9"]}, "No linears of the kind W_fc9; this model has W_Q, W_K"),
    ],
)
def test_bad_settings_are_refused_before_any_work(options, message):
    model = dense()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        store_linears(model, **{"codec": "few-bits"} | options)
    assert str(model) == before


def test_bad_models_are_refused_before_any_work():
    model = dense()
    with pytest.raises(ValueError, match="whitened-svd needs statistics of each layer's inputs"):
        store_linears(model, 4, "whitened-svd")
    model.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight contains NaN"):
        store_linears(model, 4, "few-bits")
    with pytest.raises(ValueError, match="is factored already"):
        store_linears(stored(), 4, "few-bits")
