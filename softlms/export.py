"""A compressed model as ONNX: dynamic batch and length, checked against torch before it is kept."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlms.costs import random_rows
from softlms.layers import SoftLinear
from softlms.masks import MaskedLinear
from softlms.scan import fast_scan

__all__ = ["export_onnx", "onnx_logits"]

SHAPES = ((1, 7), (3, 20))  # batch and length at which the file is checked: neither is the exported one
PROTOBUF = 1.9e9  # bytes that one file may hold
TOLERANCE = 1e-4  # of the largest logit


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"use_cache": False} if self.model.can_generate() else {}
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        return logits


def export_onnx(model: PreTrainedModel, path: str | Path, *, int8: bool = False) -> Path:
    """Write a model with inputs ``input_ids`` and ``attention_mask``, (batch, length), and output ``logits``.

    A model that tells two sentences apart, like BERT, has ``token_type_ids`` as a third.

    Parameters
    ----------
    model : PreTrainedModel
        With logits; in eval mode, float32, deployed or dense; not changed.
    path : str or Path
        The ``.onnx`` file; it appears whole or not at all.
    int8 : bool
        Store weights in 8 bits (onnxruntime's dynamic quantization) on top. The outputs then differ by what rounding
        does to this model: look at its scores. The check against torch is that of the model before.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        onnx, onnxscript or onnxruntime is missing: ``pip install softlms[export]``.
    ValueError
        The model is in training mode, in another precision, not deployed, without logits, or too large for int8 (2 GB).
    RuntimeError
        onnxruntime's logits differ from torch's by more than 1e-4 of the largest.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is missing: pip install softlms[export].")
    if model.training:
        raise ValueError("The model is in training mode: call model.eval() first.")
    if model.dtype != torch.float32:
        raise ValueError(f"The model is in {model.dtype}: onnxruntime's CPU kernels want model.float().")
    if any(isinstance(module, SoftLinear) for module in model.modules()):
        raise ValueError("The model still learns its ranks: call softlms.deploy(model) first.")
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        raise ValueError("The model still learns its masks: cut the dense one to their ranks with softlms.truncate.")
    large = sum(p.nbytes for p in model.parameters()) > PROTOBUF
    if int8 and large:
        raise ValueError("int8 is for models below 2 GB: onnxruntime's quantization loads the whole graph.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = copy.deepcopy(model).cpu().requires_grad_(False)
    network.set_attn_implementation("eager")
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), fast_scan():
        inputs = example_rows(network, 2, 11)
        if "logits" not in network(**inputs):
            raise ValueError(f"{type(model).__name__} gives no logits: export a model with a head that does.")
    quiet = _without_notices()
    exporting = tempfile.TemporaryDirectory(prefix=".exporting-", dir=path.parent)
    with exporting as folder, torch.random.fork_rng(devices=[]), fast_scan(), quiet:
        file = Path(folder) / path.name
        torch.onnx.export(
            _Logits(network).eval(),
            tuple(inputs.values()),
            str(file),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes={name: {0: batch, 1: length} for name in inputs},
            external_data=large,
        )
        _check(network, file)
        if int8:
            file = _quantized(file)
        for part in Path(folder).iterdir():
            if part.name.startswith(file.name) and part != file:
                part.replace(path.parent / part.name)  # weights of their own, before the graph that names them
        file.replace(path)
    return path


def onnx_logits(path: str | Path, inputs: dict[str, Tensor], *, threads: int = 1) -> Tensor:
    """Logits of an exported model.

    Parameters
    ----------
    path : str or Path
    inputs : dict
        ``input_ids``, ``attention_mask`` and, where the model has them, ``token_type_ids`` (0 if not given), all
        (batch, length).
    threads : int
    """
    session = onnx_session(path, threads)
    if any(node.name == "token_type_ids" for node in session.get_inputs()):  # as transformers does without them
        inputs = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} | inputs
    logits = session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})[0]
    return torch.from_numpy(np.asarray(logits))


def example_rows(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random rows with every input of the exported model, in its order."""
    rows = random_rows(model.config.vocab_size, batch, length)
    segments = getattr(model.config, "type_vocab_size", 1)
    if segments > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        rows["token_type_ids"] = torch.randint(segments, (batch, length))
    return rows


def onnx_session(path: str | Path, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _without_notices() -> Iterator[None]:
    """Of the exporter and the quantization: about torchvision, axis names, preprocessing; nothing to act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _check(network: PreTrainedModel, file: Path) -> None:
    for batch, length in SHAPES:
        inputs = example_rows(network, batch, length)
        inputs["attention_mask"][0, :2] = 0  # padding on the left, as generation has it
        with torch.inference_mode():
            expected = network(**inputs).logits
        got = onnx_logits(file, inputs)
        if expected.ndim == 3:  # a token each: what stands at padding means nothing
            seen = inputs["attention_mask"].bool()
            expected, got = expected[seen], got[seen]
        error = (got - expected).abs().max().item() / expected.abs().max().item()
        if not error < TOLERANCE:
            raise RuntimeError(f"onnxruntime's logits differ from torch's by {error:.1e} of the largest: not kept.")


def _quantized(file: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(file)
    graph.graph.ClearField("value_info")  # the exporter's shapes of weights are those before it transposed them
    onnx.save(graph, file)
    small = file.with_name(f"int8-{file.name}")
    quantize_dynamic(file, small, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    small.replace(file)
    return file
