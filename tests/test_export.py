"""Compressed models outside of eager torch: ONNX, torch.export, torch.compile."""

import copy
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import softlms
from softlms.architectures import find_targets
from softlms.costs import random_rows
from softlms.export import export_onnx, onnx_logits
from softlms.factorization import factorize_weight
from softlms.language_models import SmallModel
from softlms.masks import MaskedLinear

pytest.importorskip("onnxruntime")
FAMILIES = [("bert", False), ("gpt2", False), ("gpt2", True), ("llama", False), ("mamba", False)]


def compressed(tiny_bert, family, split):
    """Some layers thin, some dense."""
    if family == "bert":
        model = tiny_bert()
    else:
        model = AutoModelForCausalLM.from_config(SmallModel(family, hidden=64, layers=2, vocabulary=300).config).eval()
    if split:
        softlms.split_fused(model)
    return softlms.truncate(model, {t.name: (5, min(t.shape))[i % 2] for i, t in enumerate(find_targets(model))})


def rows(model, batch, length, padded=True):
    inputs = random_rows(model.config.vocab_size, batch, length)
    if padded:
        inputs["attention_mask"][0, :3] = 0
    return inputs


@pytest.mark.parametrize("family, split", FAMILIES)
def test_onnx_is_torch_at_any_batch_and_length(tiny_bert, tmp_path, family, split):
    model = compressed(tiny_bert, family, split)
    before = copy.deepcopy(model.state_dict())
    path = export_onnx(model, tmp_path / "new" / "model.onnx")
    for batch, length in ((1, 1), (2, 11), (5, 33)):
        inputs = rows(model, batch, length, padded=length > 3)
        with torch.inference_mode():
            expected = model(**inputs).logits
        got = onnx_logits(path, inputs)
        if expected.ndim == 3:
            seen = inputs["attention_mask"].bool()
            expected, got = expected[seen], got[seen]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert sorted(part.name for part in path.parent.iterdir()) == ["model.onnx"]
    assert path.stat().st_size < 1.6 * sum(p.nbytes for p in model.parameters()) + 400_000


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


def test_int8_composes(tiny_bert, tmp_path):
    model = tiny_bert(hidden_size=128, intermediate_size=512, num_hidden_layers=2, initializer_range=0.05)
    softlms.truncate(model, {target.name: 32 for target in find_targets(model)})
    whole, small = (export_onnx(model, tmp_path / name, int8=name == "small.onnx") for name in ("w.onnx", "small.onnx"))
    assert small.stat().st_size < 0.55 * whole.stat().st_size
    inputs = rows(model, 4, 16)
    with torch.inference_mode():
        expected = model(**inputs).logits
    error = (onnx_logits(small, inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


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
    with pytest.raises(ValueError, match=r"BertModel gives no logits"):
        export_onnx(model.bert, tmp_path / "x.onnx")
    state = torch.random.get_rng_state()
    export_onnx(model, tmp_path / "y.onnx").unlink()
    assert torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setattr("softlms.export.onnx_logits", lambda path, inputs: torch.zeros(len(inputs["input_ids"]), 2))
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
