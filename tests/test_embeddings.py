"""Compressed embeddings: what is stored, tied heads, saving, resizing, and the three ways to find codes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import softlms
from softlms.experiments.recipe import Recipe
from softlms.methods.embeddings.fit import FITS, direction_loss, latent_size
from softlms.methods.embeddings.module import CompressedEmbedding, CompressedHead
from softlms.methods.embeddings.surgery import compress_embeddings

WORDS, SIZE = 120, 32
TEXT = torch.randint(5, WORDS, (2, 11), generator=torch.Generator().manual_seed(0))
BERT = {"vocab_size": WORDS, "hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 48, "initializer_range": 0.2, "max_position_embeddings": 64}
LLAMA = BERT | {"num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = {"vocab_size": WORDS, "n_embd": SIZE, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
FAMILIES = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**BERT)), AutoModelForSequenceClassification),
    "bert with a head": (lambda: BertForMaskedLM(BertConfig(**BERT)), AutoModelForMaskedLM),
    "roberta with a head": (lambda: RobertaForMaskedLM(RobertaConfig(**BERT)), AutoModelForMaskedLM),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), AutoModelForCausalLM),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), AutoModelForCausalLM),
    "llama, untied": (
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | {"tie_word_embeddings": False})),
        AutoModelForCausalLM,
    ),
}
TIED = ("bert with a head", "roberta with a head", "gpt2", "llama")


def dense(family):
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():  # biases that are not zero
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                values.normal_(std=0.1)
    return model


def small(family, times=3.0, **options):
    return compress_embeddings(dense(family), times, **{"epochs": 2} | options)


def outputs(model):
    with torch.no_grad():
        return model(TEXT).logits


def decompressed(model, family):
    """The same model with a dense table that holds the decoded rows."""
    other = dense(family)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_decoded_table_and_fewer_numbers_are_stored(family):
    model = small(family)
    table = model.get_input_embeddings()
    assert isinstance(table, CompressedEmbedding)
    assert isinstance(model.get_output_embeddings(), CompressedHead) == (family in TIED)
    torch.testing.assert_close(outputs(model), outputs(decompressed(model, family)), rtol=0, atol=2e-5)
    k = latent_size(WORDS, SIZE, 3.0)
    stored = sum(values.numel() for values in table.parameters())
    assert stored == WORDS * k + SIZE * k + SIZE <= WORDS * SIZE / 3 < stored + WORDS + SIZE
    whole, now = (sum(p.numel() for p in m.parameters()) for m in (dense(family), model))
    assert whole - now == WORDS * SIZE - stored
    if "roberta" in family:
        return  # whose linears are not in the table
    count = softlms.count_parameters(model)
    saved = WORDS * SIZE - stored
    assert count.kept("total") == pytest.approx(1 - saved / (count.total + saved))
    assert count.kept("linear") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_and_loaded_bit_for_bit_and_beside_low_rank_linears(family, tmp_path):
    model = small(family)
    blocks = (lambda name, module: "encoder.layer" in name) if "roberta" in family else None  # not in the table
    softlms.deploy(softlms.decompose(model, targets=blocks), keep=0.5, count="linear")
    model.save_pretrained(tmp_path)
    again = FAMILIES[family][1].from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    kinds, others = ({n: type(m) for n, m in one.named_modules(remove_duplicate=False)} for one in (again, model))
    assert kinds == others
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    table, head = again.get_input_embeddings(), again.get_output_embeddings()
    if isinstance(head, CompressedHead):
        assert head.codes.weight is table.codes.weight and head.decoder.bias is table.decoder.bias
    for half in (torch.bfloat16, torch.float16):
        assert FAMILIES[family][1].from_pretrained(tmp_path, dtype=half)(TEXT).logits.dtype == half


def test_a_base_model_loads_from_a_classifiers_folder(tmp_path):
    model = small("bert")
    model.save_pretrained(tmp_path)
    base = BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(TEXT).last_hidden_state, model.bert(TEXT).last_hidden_state)


@pytest.mark.parametrize("words", [WORDS + 9, WORDS - 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_resizing_keeps_the_rows_and_the_tie(family, words, tmp_path):
    model = small(family)
    before, kept = outputs(model), min(words, WORDS)
    ids = TEXT.clamp(max=kept - 1)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(words)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert model.config.vocab_size == len(table.weight) == words
    with torch.no_grad():
        after = model(ids).logits
    if head is None:
        assert torch.equal(after, before)
    else:
        assert after.shape[-1] == words
        torch.testing.assert_close(after[..., :kept], before[..., :kept])
    if isinstance(head, CompressedHead):
        assert head.codes.weight is table.codes.weight
        model.tie_weights()
        assert head.codes.weight is table.codes.weight
    if words > WORDS:
        with torch.no_grad():
            torch.testing.assert_close(table.weight[-1], table.weight[:WORDS].mean(0), rtol=0, atol=1e-5)
            new = model(torch.full_like(TEXT, words - 1)).logits
        assert new.isfinite().all()
    model.save_pretrained(tmp_path)
    again = FAMILIES[family][1].from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, after)
    assert model.resize_token_embeddings(pad_to_multiple_of=16).codes.weight.shape[0] % 16 == 0


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_learns_with_the_embeddings_also_under_checkpointing(family):
    model, other = small(family), None
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    for one in (model, other):
        one.train()
        torch.manual_seed(0)
        one(TEXT, labels=TEXT).loss.backward()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.codes.weight is table.codes.weight
    for name, values in model.named_parameters():
        assert values.grad is not None and values.grad.any(), name
        torch.testing.assert_close(values.grad, other.get_parameter(name).grad)
    assert all(
        copied.get_output_embeddings().codes.weight is copied.get_input_embeddings().codes.weight
        for copied in (copy.deepcopy(model), other)
    )


def test_a_frozen_table_stays_frozen_and_padding_gets_no_gradient_through_its_code():
    model = dense("bert")
    model.bert.embeddings.requires_grad_(False)
    compress_embeddings(model, 3.0, epochs=1)
    assert not any(values.requires_grad for values in model.bert.embeddings.parameters())
    model = small("bert")
    ids = TEXT.clone()
    ids[:, -3:] = model.config.pad_token_id
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    codes = model.get_input_embeddings().codes
    assert codes.padding_idx == model.config.pad_token_id
    assert not codes.weight.grad[codes.padding_idx].any() and codes.weight.grad.any()


def test_onnx_has_the_codes_and_not_the_table(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    model = small("bert")
    softlms.export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feeds = {i.name: torch.ones_like(TEXT).numpy() if "mask" in i.name else TEXT.numpy() for i in session.get_inputs()}
    feeds = {name: values if "type" not in name else 0 * values for name, values in feeds.items()}
    (logits,) = session.run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(logits), outputs(model), rtol=0, atol=1e-4)
    import onnx

    sizes = [tuple(one.dims) for one in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert (WORDS, SIZE) not in sizes and (WORDS, latent_size(WORDS, SIZE, 3.0)) in sizes


# the fits


def rows(seed=0, words=300, size=24, heavy=False):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(words, size, generator=generator) @ torch.randn(size, size, generator=generator)
    lengths = torch.exp(2 * torch.randn(words, 1, generator=generator)) if heavy else 1
    return mixed * torch.linspace(2, 0.1, size) * lengths


def fitted(fit, table, k, counts=None, epochs=30.0):
    counts = torch.ones(len(table)) if counts is None else counts
    return FITS[fit](table, k, counts, epochs, 0, lambda line: None).table()


def cosine(table, decoded):
    return (1 - F.cosine_similarity(table, decoded, dim=1)).mean().item()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(1, 8))
def test_svd_has_the_least_squared_error_and_frequency_the_least_where_words_are_frequent(seed, k):
    table = rows(seed)
    counts = torch.zeros(300)
    counts[:40] = 1000
    plain, weighted = fitted("svd", table, k), fitted("frequency", table, k, counts)
    error = [(decoded - table).square().sum(1) for decoded in (plain, weighted)]
    assert error[0].sum() <= error[1].sum() * (1 + 1e-4)
    assert error[1][:40].sum() <= error[0][:40].sum() * (1 + 1e-4)
    centred = table - table.mean(0)
    tail = torch.linalg.svdvals(centred.double())[k:].square().sum()
    assert error[0].sum().item() == pytest.approx(tail.item(), rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_direction_loss_keeps_directions_better_than_svd_where_lengths_are_heavy_tailed(seed):
    table = rows(seed, heavy=True)
    assert cosine(table, fitted("direction", table, 6)) < 0.8 * cosine(table, fitted("svd", table, 6))


def test_full_rank_codes_lose_nothing():
    table = rows(words=60)
    torch.testing.assert_close(fitted("svd", table, 24), table, rtol=0, atol=1e-3)


def test_the_loss_is_the_formula_and_its_gradient_is_right():
    one = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    other = torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    assert direction_loss(one, one, 1.0).item() == pytest.approx(0.0025 * 1e-10)
    assert direction_loss(one, other, 1.0).item() == pytest.approx(0.1995 * (1 - 24 / 25) + 0.0025)
    assert direction_loss(one, 2 * one, 0.1).item() == pytest.approx(0.0025 * (3**0.1 + 4**0.1) / 2)
    a, b = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: direction_loss(x, y, 0.4), (a, b))


def test_a_seed_gives_the_same_codes_and_progress_is_told():
    lines = []
    one = FITS["direction"](rows(), 5, torch.ones(300), 3, 7, lines.append)
    other = FITS["direction"](rows(), 5, torch.ones(300), 3, 7, lambda line: None)
    assert torch.equal(one.codes, other.codes) and len(lines) == 3


# as a method, and what is refused


@pytest.mark.parametrize("fit", FITS)
def test_it_is_a_method_of_chains(bench, fit):
    settings = {f"{fit}-embeddings": {"times": 4.0, "fit_epochs": 0.05, "epochs": 0}}
    recipe = Recipe(dense_epochs=1, epochs=1, calibration_rows=16, settings=settings)
    run = bench.run(f"{fit}-embeddings+whitened+uniform", recipe, 0).result
    table = bench.untrained_model().get_input_embeddings().weight
    assert run["latent"] == latent_size(*table.shape, 4.0)
    assert 0 < run["cosine"] < 1 and run["rmse"] > 0
    assert run["steps"] == 3 and run["kept_linear"] <= 0.5 and run["kept_total"] < 0.35


class Own(nn.Embedding):
    """A class of its own, as Gemma's."""


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda model: None, {"times": 0.9}, "times must be above 1 and at most 21 for 120 words of 32, got 0.9"),
        (lambda model: None, {"times": 40}, "times must be above 1 and at most 21 for 120 words of 32, got 40"),
        (lambda model: None, {"fit": "pca"}, "fit must be one of 'direction', 'svd', 'frequency', got 'pca'"),
        (lambda model: None, {"fit": "frequency"}, "fit 'frequency' needs counts"),
        (lambda model: compress_embeddings(model, 3, "svd"), {}, "The embeddings are compressed already"),
        (lambda model: model.set_input_embeddings(Own(WORDS, SIZE)), {}, "The embeddings are a Own: codes have none"),
        (
            lambda model: model.get_input_embeddings().weight.data.fill_(torch.nan),
            {},
            "NaN or infinite: load",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused_before_any_work(change, options, message):
    model = dense("llama")
    change(model)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        compress_embeddings(model, **{"epochs": 1} | options)
    assert str(model) == before


def test_a_table_that_more_than_the_head_shares_is_refused():
    config = T5Config(vocab_size=WORDS, d_model=SIZE, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="shares the table of embeddings, and would come untied"):
        compress_embeddings(model, 3.0)
    model.resize_token_embeddings(WORDS + 1)  # now they are one module
    with pytest.raises(ValueError, match="The embeddings are in .*, and would come untied"):
        compress_embeddings(model, 3.0)


def test_adapters_leave_the_decoder_alone_and_hooks_stay_after_resizing():
    peft = pytest.importorskip("peft")
    model = small("llama")
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.resize_token_embeddings(WORDS - 110, mean_resizing=True)
    outputs_of = model(TEXT.clamp(max=9)).logits
    assert seen == [(2, 11, SIZE)] and outputs_of.shape[-1] == 10
    with pytest.raises(ValueError, match="leave mean_resizing at True"):
        model.resize_token_embeddings(WORDS, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert not any("embed_tokens" in name for name, _ in wrapped.named_parameters() if "lora" in name)
