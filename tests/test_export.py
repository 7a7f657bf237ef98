"""Compressed models outside of eager torch: ONNX, torch.export, torch.compile."""

import copy
import re
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from folders import FAMILIES, dense
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    default_data_collator,
)

import softlms
from softlms.architectures import find_targets
from softlms.data.corpus import docstrings
from softlms.data.encoders import find_encoder
from softlms.data.inputs import prepared
from softlms.data.tasks import TASKS
from softlms.evaluation.metrics import METRICS
from softlms.export import export_onnx, onnx_logits
from softlms.lowrank.basis import change_basis_
from softlms.lowrank.factorization import factorize_weight
from softlms.lowrank.masks import MaskedLinear
from softlms.measure import random_rows

pytest.importorskip("onnxruntime")


def compressed(tiny_bert, family, split):
    """Some layers thin, some dense."""
    model = dense(tiny_bert, family, split)
    return softlms.truncate(model, {t.name: (5, min(t.shape))[i % 2] for i, t in enumerate(find_targets(model))})


def said(caplog):
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "softlms.export")


def rows(model, batch, length, padded=True):
    inputs = random_rows(model.config.vocab_size, batch, length)
    if padded:
        # on the left, as generation has it, but for a classifier that reads the first token
        inputs["attention_mask"][0, slice(-3, None) if model.config.model_type == "bert" else slice(3)] = 0
    return inputs


@pytest.mark.parametrize("family, split", FAMILIES)
def test_onnx_is_torch_at_any_batch_and_length(tiny_bert, tmp_path, family, split):
    model = compressed(tiny_bert, family, split)
    before = copy.deepcopy(model.state_dict())
    path = export_onnx(model, tmp_path / "new" / "model.onnx")
    for batch, length in ((1, 1), (2, 11), (5, 33)):
        inputs = rows(model, batch, length, padded=length > 3)
        with torch.inference_mode():
            expected = model(**prepared(model, inputs)).logits
        got = onnx_logits(path, inputs)
        if expected.ndim == 3:
            seen = inputs["attention_mask"].bool()
            expected, got = expected[seen], got[seen]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert sorted(part.name for part in path.parent.iterdir()) == ["model.onnx"]
    assert path.stat().st_size < 1.6 * sum(p.nbytes for p in model.parameters()) + 400_000


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_a_row_that_is_padded_on_the_left_means_what_it_means_alone(tiny_bert, tmp_path, family):
    path = export_onnx(compressed(tiny_bert, family, False), tmp_path / "model.onnx")
    alone = {"input_ids": torch.tensor([[7, 8, 9, 10]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    padded = {name: torch.nn.functional.pad(values, (3, 0)) for name, values in alone.items()}
    torch.testing.assert_close(onnx_logits(path, padded)[:, 3:], onnx_logits(path, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_int8_takes_what_the_graph_takes_of_rows_and_collator(tiny_bert, tmp_path, caplog):
    """Labels that a collator adds and a tokenizer's segments are nothing that a GPT-2 knows."""
    language = compressed(tiny_bert, "gpt2", False)
    tokenizer = find_encoder("minilm").tokenizer()
    ids = [[5 + i, 6 + i, 7 + i][: 1 + i % 3] for i in range(40)]
    given = {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids], "labels": ids}
    for collator in (DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorWithPadding(tokenizer)):
        export_onnx(
            language, tmp_path / "int8.onnx", int8=True, rows=datasets.Dataset.from_dict(given), data_collator=collator
        )
        assert re.search(r"answers as torch does in \d+\.\d% of 79 cases", said(caplog))
        caplog.clear()


def test_segments_of_sentence_pairs_are_exported(tiny_bert, tmp_path):
    model = compressed(tiny_bert, "bert", False)
    torch.nn.init.normal_(model.bert.embeddings.token_type_embeddings.weight)
    path = export_onnx(model, tmp_path / "pairs.onnx")
    inputs = rows(model, 3, 12)
    inputs["token_type_ids"] = (torch.arange(12) > 5).long().expand(3, 12)
    with torch.inference_mode():
        pairs = model(**inputs).logits
    torch.testing.assert_close(onnx_logits(path, inputs), pairs, rtol=1e-4, atol=1e-4)
    del inputs["token_type_ids"]
    assert (onnx_logits(path, inputs) - pairs).norm() > 0.01 * pairs.norm()


@pytest.mark.slow
def test_int8_is_near_where_columns_differ_by_orders_of_magnitude(tiny_bert, tmp_path, caplog):
    """As learned ranks leave them: one scale a tensor would round most of a layer to nothing."""
    model = tiny_bert(hidden_size=128, intermediate_size=512, num_hidden_layers=2, initializer_range=0.05)
    softlms.truncate(model, {target.name: 32 for target in find_targets(model)})
    change_basis_(model, uneven)
    before = copy.deepcopy(model.state_dict())
    whole = export_onnx(model, tmp_path / "whole.onnx")
    assert not said(caplog)
    small = export_onnx(model, tmp_path / "small.onnx", int8=True)
    assert re.search(r"int8: logits are \d\.\d% off torch's on random tokens; .* unknown: pass rows=", said(caplog))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert small.stat().st_size < 0.55 * whole.stat().st_size
    inputs = rows(model, 4, 16)
    with torch.inference_mode():
        expected = model(**inputs).logits
    error = (onnx_logits(small, inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_int8_says_what_it_costs_on_the_users_rows(tiny_folder, tmp_path, caplog, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    texts = [f"Sentence {i} of {'a few ' * (i % 5)}words." for i in range(40)]
    dataset, collator = datasets.Dataset.from_dict(dict(tokenizer(texts))), DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder)
    export_onnx(model, tmp_path / "small.onnx", int8=True, rows=dataset, data_collator=collator)
    found = re.search(r"answers as torch does in (\S+)% of 40 cases, logits are \d\.\d% off", said(caplog))
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        same = onnx_logits(tmp_path / "small.onnx", inputs).argmax(-1) == model(**inputs).logits.argmax(-1)
    assert abs(float(found[1]) / 100 - same.double().mean()) <= 0.025  # batches of 32 have scales of their own
    (tmp_path / "small.onnx").unlink()
    monkeypatch.setattr("softlms.export.AGREEMENT", 1.01)
    with pytest.raises(RuntimeError, match=r"int8 answers as torch does in \S+% of 40 cases: not kept"):
        export_onnx(model, tmp_path / "small.onnx", int8=True, rows=dataset, data_collator=collator)
    assert not list(tmp_path.iterdir())
    for wrong, options in (
        ("at least one row", {"rows": dataset.select([]), "data_collator": collator}),
        ("need data_collator", {"rows": dataset}),
        ("rows are for int8", {"rows": dataset, "data_collator": collator, "int8": False}),
    ):
        with pytest.raises(ValueError, match=wrong):
            export_onnx(model, tmp_path / "small.onnx", **{"int8": True} | options)


@pytest.mark.slow
def test_int8_of_a_score_and_of_tokens_is_said(tiny_bert, tmp_path, caplog):
    dataset = datasets.Dataset.from_dict({"input_ids": torch.randint(300, (6, 9)).tolist()})
    score = tiny_bert(num_labels=1, vocab_size=300)
    export_onnx(score, tmp_path / "score.onnx", int8=True, rows=dataset, data_collator=default_data_collator)
    assert re.search(r"int8: logits are \S+% off torch's on 6 rows", said(caplog))
    language = dense(tiny_bert, "gpt2")
    export_onnx(language, tmp_path / "lm.onnx", int8=True, rows=dataset, data_collator=default_data_collator)
    assert "% of 54 cases" in said(caplog)


def sentences(tokenizer):
    """First lines of docstrings; label 1 where they are matplotlib's, 0 where they are numpy's."""
    found = []
    for library in ("numpy", "matplotlib"):
        lines = (doc.split("\n")[0] for docs in docstrings((library,)).values() for doc in docs)
        found.append([line for line in lines if len(line.split()) > 5][:320])
    texts = [line for pair in zip(*found, strict=True) for line in pair]
    encoded = dict(tokenizer(texts)) | {"labels": [0, 1] * 320}
    return datasets.Dataset.from_dict(encoded).train_test_split(0.5, seed=0)


def uneven(down, up):
    """Columns that differ by orders of magnitude, as learned ranks leave them; the product is the same."""
    scales = torch.logspace(-2, 2, len(down), dtype=down.dtype)
    return down * scales[:, None], up / scales


@pytest.mark.slow
@torch.no_grad()
def test_int8_keeps_the_score_of_a_compressed_minilm(tmp_path):
    """What is wanted of the export is the task's score: logits that are near may still answer otherwise."""
    encoder = find_encoder("minilm")
    model, tokenizer = encoder.for_task(TASKS["mrpc"]).eval(), encoder.tokenizer()
    split, collator = sentences(tokenizer), DataCollatorWithPadding(tokenizer)
    softlms.decompose(model, "whitened", softlms.calibrate(model, split["train"], collator, rows=64))
    softlms.deploy(model, keep=0.35, count="linear")
    change_basis_(model, uneven)
    inputs = split.select_columns(["input_ids", "attention_mask", "token_type_ids"])
    batches = {name: [dict(b) for b in DataLoader(rows, 32, collate_fn=collator)] for name, rows in inputs.items()}
    features = torch.cat([model.bert(**batch).pooler_output for batch in batches["train"]])
    head = LogisticRegression(max_iter=1000).fit(features.numpy(), split["train"]["labels"])
    weight, bias = torch.from_numpy(head.coef_).float(), torch.from_numpy(head.intercept_).float()
    model.classifier.weight.copy_(torch.cat([-weight, weight]) / 2)
    model.classifier.bias.copy_(torch.cat([-bias, bias]) / 2)

    def score(answer):
        answers = torch.cat([answer(batch) for batch in batches["test"]]).argmax(-1)
        return METRICS["f1"](np.asarray(split["test"]["labels"]), answers.numpy())

    expected = score(lambda batch: model(**batch).logits)
    path = export_onnx(model, tmp_path / "small.onnx", int8=True, rows=split["test"], data_collator=collator)
    assert expected > 0.8
    assert abs(score(partial(onnx_logits, path)) - expected) < 0.02  # one scale a tensor, factors as given: 0.17


def test_bad_exports_are_refused(tiny_bert, tmp_path, monkeypatch):
    model = compressed(tiny_bert, "bert", False)
    with pytest.raises(ValueError, match=r"training mode: call model.eval"):
        export_onnx(copy.deepcopy(model).train(), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"torch.bfloat16: .* want model.float"):
        export_onnx(copy.deepcopy(model).bfloat16(), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"still learns its ranks: call softlms.deploy"):
        export_onnx(softlms.decompose(tiny_bert()), tmp_path / "x.onnx")
    masked = tiny_bert()
    target = find_targets(masked)[0]
    masked.set_submodule(target.name, MaskedLinear(factorize_weight(target.module.weight), target.module.bias))
    with pytest.raises(ValueError, match=r"still learns its masks: .* softlms.truncate"):
        export_onnx(masked, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"BertModel returns no logits"):
        export_onnx(model.bert, tmp_path / "x.onnx")
    state = torch.random.get_rng_state()
    export_onnx(model, tmp_path / "y.onnx").unlink()
    assert torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setattr("softlms.export._run", lambda session, inputs: torch.zeros(len(inputs["input_ids"]), 2))
    with pytest.raises(RuntimeError, match=r"differ from torch's by 1.0e\+00 of the largest: not kept"):
        export_onnx(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["bert", "mamba"])
def test_torch_export_keeps_batch_and_length_free(tiny_bert, family):
    model = compressed(tiny_bert, family, False)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    options = {"use_cache": False} if model.can_generate() else {}
    with softlms.fast_scan():
        program = torch.export.export(
            model, (), rows(model, 2, 11) | options,
            dynamic_shapes={"input_ids": dims, "attention_mask": dims} | dict.fromkeys(options), strict=False,
        )  # fmt: skip
    inputs = rows(model, 3, 20)
    with torch.inference_mode():
        expected = model(**inputs).logits
        torch.testing.assert_close(program.module()(**inputs, **options).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family, split", FAMILIES)
def test_compiles_whole_and_trains(tiny_bert, family, split):
    """Captured by dynamo and differentiated by aot autograd; no C++ compiler is needed to see that."""
    model = compressed(tiny_bert, family, split)
    inputs = rows(model, 2, 6, padded=False)
    expected = model(**inputs).logits
    with softlms.fast_scan():
        logits = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".down." in n or ".up." in n)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").is_file()),
    reason="torch.compile writes C++ for this Python: on Linux, with g++ and Python's headers",
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mamba"])
def test_compiled_code_gives_the_same_logits(tiny_bert, family):
    torch.compiler.reset()  # else what other models of this class have left counts as recompilations
    model = compressed(tiny_bert, family, False)
    with softlms.fast_scan(), torch.inference_mode():
        inputs = rows(model, 2, 6, padded=False)
        logits = torch.compile(model, fullgraph=True)(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_soft_form_compiles(tiny_bert):
    model = softlms.decompose(tiny_bert())
    for i, layer in enumerate(softlms.surgery.soft_layers(model).values()):
        layer.set_rank_(4 + i)
    inputs = rows(model, 2, 6)
    logits = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
