"""Score models under onnxruntime with 8-bit weights, in every way to round them, and add rows to a CSV file.

    softlms compress --model minilm --task mrpc --data DIR --keep 0.35 --out small
    python tests/tools/measure_int8.py small --task mrpc --data DIR --out results/export_int8.csv

A model takes minutes. The score is that of the test split, where its labels are public, else of dev, in batches of 32
rows of like length; times are of one row, one thread, all ways in turn. Not part of the test suite.
"""

import argparse
import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, EvalPrediction

from softlms.data.tasks import encode, load_task
from softlms.evaluation.metrics import compute_metrics
from softlms.experiments.jobs import be_quiet
from softlms.experiments.provenance import append_rows
from softlms.export import example_rows, export_onnx, onnx_session, quantize
from softlms.lowrank.basis import balance, change_basis_, rotate
from softlms.measure import interleaved
from softlms.utils.machine import hardware, versions

BASES = {"as trained": (), "balanced": (balance,), "balanced, rotated": (balance, rotate)}
LINEARS = ["MatMul", "Gemm"]
ROUNDED = {  # options of onnxruntime's quantize_dynamic
    "one scale a tensor": {},
    "a scale an output": {"per_channel": True},
    "a scale an output, 7 bits": {"per_channel": True, "reduce_range": True},
    "a scale an output, embeddings too": {"per_channel": True, "op_types_to_quantize": [*LINEARS, "Gather"]},
}


def run(session, inputs):
    return session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})[0]


def weights_rounded(model):
    """Rounded as `a scale an output` does, but not the inputs of the layers."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            layer.weight.data = (layer.weight.data / scale).round() * scale
    return model


def measure(folder, task, data, rounds, tokens):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = load_task(task, data)
    splits = encode(source, tokenizer)
    split = "test" if "test" in splits else "dev"
    rows = splits[split].select(np.argsort(splits[split]["length"], kind="stable"))
    taken = example_rows(model, 1, 5)
    inputs = rows.select_columns([column for column in rows.column_names if column in taken])
    batches = [dict(batch) for batch in DataLoader(inputs, 32, collate_fn=DataCollatorWithPadding(tokenizer))]
    labels, score, example = np.asarray(rows["labels"]), compute_metrics(source.task), example_rows(model, 1, tokens)
    ways, found = {}, []

    def note(weights, basis, call, path=None):
        with torch.inference_mode():
            logits = np.concatenate([np.asarray(call(batch)) for batch in batches])
        expected = found[0]["logits"] if found else logits
        ways[weights, basis] = partial(call, example)
        found.append(
            {"model": Path(folder).name, "seed": notes.get("seed"), "keep": notes.get("keep"), "split": split}
            | {"weights": weights, "basis": basis, "logits": logits} | score(EvalPrediction(logits, labels))
            | {"agreement": (logits.argmax(1) == expected.argmax(1)).mean()}
            | {"logits_off": np.linalg.norm(logits - expected) / np.linalg.norm(expected)}
            | {"file_mb": path.stat().st_size / 1e6 if path else None}
        )  # fmt: skip
        print({k: v for k, v in found[-1].items() if k != "logits"}, flush=True)

    notes = getattr(model.config, "softlms", None) or {}
    note("float32, torch", "as trained", lambda batch: model(**batch).logits)
    with tempfile.TemporaryDirectory() as place:
        for basis, changes in BASES.items():
            changed = copy.deepcopy(model)
            change_basis_(changed, *changes)
            whole = export_onnx(changed, Path(place) / f"{basis}.onnx")
            if not changes:
                note("float32", basis, partial(run, onnx_session(whole)), whole)
            for weights, options in ROUNDED.items():
                path = Path(place) / f"{basis}, {weights}.onnx"
                path.write_bytes(whole.read_bytes())
                quantize(path, **options)
                note(weights, basis, partial(run, onnx_session(path)), path)
            rounded = weights_rounded(changed)
            note("a scale an output, inputs float32, torch", basis, lambda batch, m=rounded: m(**batch).logits)
        path = export_onnx(model, Path(place) / "export_onnx.onnx", int8=True)
        note("export_onnx(int8=True)", "its own", partial(run, onnx_session(path)), path)
        with torch.inference_mode():
            seconds = interleaved(ways, rounds)
    medians = [1e3 * statistics.median(taken) for taken in seconds.values()]
    table = pd.DataFrame(found).drop(columns="logits").assign(median_ms=medians, rounds=rounds, tokens=tokens)
    table = table.assign(task=task, data=source.source, hardware=hardware())
    return table.assign(versions=f"{versions()}, onnxruntime {onnxruntime.__version__}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="classifiers, dense or compressed")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True, help="folder in GLUE's layout, hub, or embedded for docpairs")
    parser.add_argument("--out", required=True, help="CSV file that gets these rows more")
    parser.add_argument("--rounds", type=int, default=41, help="of timing (default 41)")
    parser.add_argument("--tokens", type=int, default=64, help="in the row that is timed (default 64)")
    options = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    for folder in options.models:
        append_rows(options.out, measure(folder, options.task, options.data, options.rounds, options.tokens))


if __name__ == "__main__":
    main()
