"""What memory training takes: counted for every model, and measured by a step where it fits this machine."""

from __future__ import annotations

from typing import Any

import pandas as pd
import psutil
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from softlms.architectures import find_targets
from softlms.experiments.full_size import find_full_size, peak_gb
from softlms.experiments.provenance import append_rows
from softlms.experiments.stretch import half_ranks
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import SoftLinear
from softlms.machine import hardware, versions
from softlms.measure import random_rows
from softlms.modules import as_linear, replace
from softlms.ranges import check_at_least_one
from softlms.surgery import shrink

__all__ = ["FORMS", "print_training_memory", "training_memory"]

FORMS = ("dense", "soft", "deployed")
STATE = 16  # bytes a parameter: weight, gradient and AdamW's two moments in float32


def training_memory(
    model: str, form: str, *, layers: int | None = None, batch: int = 1, tokens: int = 128
) -> dict[str, Any]:
    """Memory of a training step in fp32 with AdamW.

    Parameters
    ----------
    model : str
        A key of `softlms.experiments.full_size.FULL_SIZE`; random weights.
    form : {"dense", "soft", "deployed"}
        Dense; decomposed at full rank, as training starts; or deployed at half of the total parameters, as it recovers.
    layers : int, optional
        Only so many blocks (dense and soft only).
    batch, tokens : int
        Rows, and tokens a row; what activations need grows with both.

    Returns
    -------
    dict
        "parameters" that are trained; "states_gb", their weights, gradients and moments, 16 bytes each; "peak_gb", the
        most that this process has held after one step, NaN where the states alone exceed nine tenths of the machine's
        memory. Call it in a fresh process: the peak counts what was there before.

    Raises
    ------
    ValueError
        Unknown model or form, or a number below 1.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}.")
    check_at_least_one(batch=batch, tokens=tokens)
    create, config = find_full_size(model, layers)
    with torch.device("meta"):
        skeleton = _in_form(create(None), model, form)
    parameters = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    peak = float("nan")
    if STATE * parameters < 0.9 * psutil.virtual_memory().total:
        torch.manual_seed(0)
        network = _in_form(create(None), model, form)
        inputs = random_rows(config.vocab_size, batch, tokens)
        inputs["labels"] = inputs["input_ids"] if network.can_generate() else torch.zeros(batch, dtype=torch.long)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        with fast_scan():
            network.train()(**inputs).loss.backward()
        optimizer.step()
        peak = peak_gb()
    return {
        "model": model,
        "form": form,
        "blocks": config.num_hidden_layers,
        "batch": batch,
        "tokens": tokens,
        "parameters": parameters,
        "states_gb": STATE * parameters / 1e9,
        "peak_gb": peak,
        "hardware": hardware(),
        "versions": versions(),
    }


def print_training_memory(*, model: str, form: str, out: str = "", **options: Any) -> None:
    """The ``softlms training-memory`` command: one line, and a row more of the CSV that `out` names."""
    result = training_memory(model, form, **options)
    peak = "does not fit this machine" if result["peak_gb"] != result["peak_gb"] else f"{result['peak_gb']:.1f} GB"
    Console().print(
        f"{model}, {form}: {result['parameters'] / 1e6:.1f} M parameters, {result['states_gb']:.1f} GB of states, "
        f"peak of a step {peak}",
        highlight=False,
        soft_wrap=True,
    )
    if out:
        append_rows(out, pd.DataFrame([result]))


def _in_form(network: PreTrainedModel, model: str, form: str) -> PreTrainedModel:
    if form == "deployed":
        return shrink(network, half_ranks(model, network))
    if form == "soft":
        for target in find_targets(network):
            linear = as_linear(target.module)
            description = {"components": min(target.shape), "s": 50.0, "learns": True, "transposed": False}
            layer = SoftLinear.skeleton(linear, description)
            with torch.no_grad():
                for factor in (layer.U, layer.V):
                    nn.init.normal_(factor, std=0.02)
                layer.sigma.fill_(1)
                if layer.bias is not None:
                    layer.bias.zero_()
            replace(network, target.name, layer)
    return network
