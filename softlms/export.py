"""Export a compressed model to ONNX with dynamic batch and length; the file is checked against torch.

8-bit weights do change the outputs, so this check does not apply to them: the change is measured and reported.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel
from transformers.utils import logging as transformers_logging

from softlms.data.inputs import positions, wants_positions
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import SoftLinear
from softlms.lowrank.basis import balance, change_basis_, rotate
from softlms.lowrank.masks import MaskedLinear
from softlms.measure import random_rows

__all__ = ["export_onnx", "onnx_logits"]

SHAPES = ((1, 7), (3, 20))  # batch and length of the checks, other than those of the export
PROTOBUF = 1.9e9  # largest size of one file in bytes
TOLERANCE = 1e-4  # relative to the largest logit
AGREEMENT = 0.9  # share of rows on which the 8-bit model must give torch's answer

logger = transformers_logging.get_logger(__name__)


class _Logits(nn.Module):
    """The graph to export: padding before a row does not change its result (see `softlms.data.inputs`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.numbered = wants_positions(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"use_cache": False} if self.model.can_generate() else {}
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        if self.numbered:
            options["position_ids"] = positions(attention_mask)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        return logits


def export_onnx(
    model: PreTrainedModel,
    path: str | Path,
    *,
    int8: bool = False,
    rows: datasets.Dataset | None = None,
    data_collator: DataCollator | None = None,
) -> Path:
    """Export a model with inputs ``input_ids`` and ``attention_mask``, (batch, length), and output ``logits``.

    A model with sentence types, like BERT, has ``token_type_ids`` as a third input.

    Parameters
    ----------
    model : PreTrainedModel
        A model with logits, in eval mode, float32, deployed or dense. It is not changed.
    path : str or Path
        The ``.onnx`` file. It is written completely or not at all.
    int8 : bool
        Also store the weights of linear layers in 8 bits, with one scale per output (onnxruntime's dynamic
        quantization; layer inputs are rounded to 8 bits at run time). Thin layers are stored in a basis that loses
        little (`softlms.lowrank.basis`). Only 7 of the 8 bits are used, so that processors without VNNI instructions,
        on which 16-bit sums would overflow, give the same answers. The check against torch is done before rounding.
        The effect of rounding is measured on `rows`, else on random tokens, which say nothing about a task. It is
        logged as a one-line warning.
    rows : Dataset, optional
        For int8: a split from `softlms.encode`, such as dev. Accuracy can lose at most the share of rows on which the
        answer (the largest logit) differs from torch's.
    data_collator : callable, optional
        Pads a batch of `rows`, as for ``transformers.Trainer``.

    Returns
    -------
    Path
        Path of the file.

    Raises
    ------
    ImportError
        onnx, onnxscript or onnxruntime is missing: ``pip install softlms[export]``.
    ValueError
        The model is in training mode, in another precision, not deployed, without logits, or too large for int8 (2 GB);
        `rows` are empty, or given without `data_collator` or `int8`.
    RuntimeError
        onnxruntime's logits differ from torch's by more than 1e-4 of the largest, or the 8-bit model gives torch's
        answer on less than 90 % of `rows`. No file is kept.
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
        raise ValueError("The model still learns its masks: cut the dense model to their ranks with softlms.truncate.")
    large = sum(p.nbytes for p in model.parameters()) > PROTOBUF
    if int8 and large:
        raise ValueError("int8 is for models below 2 GB: onnxruntime's quantization loads the whole graph.")
    if rows is not None and not int8:
        raise ValueError("rows are for int8=True: without it the logits are torch's.")
    if rows is not None and (data_collator is None or not len(rows)):
        raise ValueError("rows need data_collator=DataCollatorWithPadding(tokenizer), and at least one row.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = copy.deepcopy(model).cpu().requires_grad_(False)
    network.set_attn_implementation("eager")
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), fast_scan():
        inputs = example_rows(network, 2, 11)
        if "logits" not in network(**inputs):
            raise ValueError(f"{type(model).__name__} returns no logits: export a model with a head that does.")
        examples = list(_answered(network, _padded(network)))
    if int8:  # the reference logits are from before: a basis that changes the outputs is detected
        change_basis_(network, balance, rotate)
    quiet = without_notices()
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
        if not (error := _compare(examples, file).largest) < TOLERANCE:
            raise RuntimeError(f"onnxruntime's logits differ from torch's by {error:.1e} of the largest: not kept.")
        if int8:
            # 7 of 8 bits: sums of two products fit 16 bits, at which processors without VNNI saturate
            file = quantize(file, per_channel=True, reduce_range=True)
            seen = examples if rows is None else _answered(network, _batches(rows, data_collator, inputs))
            said = _judge(_compare(seen, file), network, measured=rows is not None)
        for part in Path(folder).iterdir():
            if part.name.startswith(file.name) and part != file:
                part.replace(path.parent / part.name)  # separate weight files, before the graph that refers to them
        file.replace(path)
    if int8:
        logger.warning(f"{path}, int8: {said}.")
    return path


def onnx_logits(path: str | Path, inputs: dict[str, Tensor], *, threads: int = 1) -> Tensor:
    """Compute the logits of an exported model.

    Parameters
    ----------
    path : str or Path
    inputs : dict
        ``input_ids``, ``attention_mask`` and, if the model has them, ``token_type_ids`` (0 if not given), all
        (batch, length).
    threads : int
    """
    return _run(onnx_session(path, threads), inputs)


def _run(session: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    if any(node.name == "token_type_ids" for node in session.get_inputs()):  # default, as in transformers
        inputs = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
    logits = session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})[0]
    return torch.from_numpy(np.asarray(logits))


def example_rows(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random rows with every input of the exported model, in order."""
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
def without_notices() -> Iterator[None]:
    """Silence exporter and quantization notices on torchvision, axis names, preprocessing: no action is needed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def quantize(file: Path, **options: Any) -> Path:
    """Round weights of linear layers to 8 bits, in place; options as for onnxruntime's quantize_dynamic."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(file)
    graph.graph.ClearField("value_info")  # the exporter's weight shapes are from before it transposed them
    onnx.save(graph, file)
    small = file.with_name(f"int8-{file.name}")
    # a Gemm becomes a MatMul; the scales belong to the last axis, the outputs
    options = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"]} | options
    quantize_dynamic(file, small, **options)
    small.replace(file)
    return file


@dataclass(frozen=True)
class Difference:
    """Difference of onnxruntime's logits from torch's.

    Attributes
    ----------
    largest : float
        Maximum, relative to the largest logit of the batch.
    relative : float
        Root mean square, relative to that of torch's logits.
    same : Tensor
        Whether the largest logit is the same: for each row, or for each token if each has logits.
    """

    largest: float
    relative: float
    same: Tensor


def _compare(batches: Iterable[tuple[Mapping[str, Tensor], Tensor]], file: Path) -> Difference:
    """Compare torch's logits on batches with those of the file."""
    session = onnx_session(file)
    largest, same, squares = [], [], torch.zeros(2, dtype=torch.float64)
    for inputs, expected in batches:
        got = _run(session, inputs)
        if expected.ndim == 3:  # logits per token: those at padding are meaningless
            seen = inputs["attention_mask"].bool()
            expected, got = expected[seen], got[seen]
        largest.append((got - expected).abs().max() / expected.abs().max())
        same.append(got.argmax(-1) == expected.argmax(-1))
        squares += torch.stack([(got - expected).double().square().sum(), expected.double().square().sum()])
    return Difference(torch.stack(largest).max().item(), (squares[0] / squares[1]).sqrt().item(), torch.cat(same))


def _judge(found: Difference, network: PreTrainedModel, *, measured: bool) -> str:
    """Describe the effect of 8 bits on the model; RuntimeError if they break it."""
    off = f"logits are {found.relative:.1%} off torch's"
    if not measured:
        return f"{off} on random tokens; the effect on your task is unknown: pass rows=... and data_collator=..."
    if network.config.num_labels == 1:  # a score
        return f"{off} on {len(found.same)} rows"
    same, cases = found.same.double().mean().item(), len(found.same)
    if same < AGREEMENT:
        raise RuntimeError(f"int8 answers as torch does in {same:.1%} of {cases} cases: not kept. Leave int8 out.")
    return f"answers as torch does in {same:.1%} of {cases} cases, {off}"


def _padded(network: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    for batch, length in SHAPES:
        inputs = example_rows(network, batch, length)
        inputs["attention_mask"][0, :2] = 0  # left padding, as in generation
        yield inputs


def _batches(
    rows: datasets.Dataset, data_collator: DataCollator | None, taken: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """The graph's inputs, from rows and from what the collator adds."""
    inputs = rows.select_columns([column for column in rows.column_names if column in taken])
    for batch in DataLoader(inputs, 32, collate_fn=data_collator):
        given = {name: values for name, values in batch.items() if name in taken}
        yield {"attention_mask": torch.ones_like(batch["input_ids"]), **given}


@torch.inference_mode()
def _answered(
    network: PreTrainedModel, batches: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    graph = _Logits(network).eval()
    for batch in batches:
        yield batch, graph(**batch)
