"""The cost of a training step: its time, with forms taking turns, and its memory."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from softlms.architectures import find_targets
from softlms.budget import Budget, parameter_costs, uniform_ranks
from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS
from softlms.experiments.full_size import find_full_size, half_ranks, peak_gb
from softlms.experiments.provenance import append_rows
from softlms.experiments.timing import summarize_times
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import SoftLinear
from softlms.measure import interleaved, random_rows
from softlms.modules import as_linear, replace
from softlms.surgery import decompose, shrink, soft_layers
from softlms.utils.machine import hardware, use_threads, versions
from softlms.utils.ranges import check_at_least_one

__all__ = [
    "print_scan_times",
    "print_step_times",
    "print_training_memory",
    "scan_times",
    "step_times",
    "training_memory",
]

FORMS = ("dense", "soft", "deployed")
STATE = 16  # bytes for each parameter: weight, gradient and AdamW's two moments in float32


def step_times(
    model: PreTrainedModel, *, batch: int = 16, tokens: int = 64, rounds: int = 15, threads: int = 1, keep: float = 0.5
) -> dict[str, list[float]]:
    """Seconds of each training step: forward, backward, clipping, AdamW.

    Parameters
    ----------
    model : PreTrainedModel
        Dense classifier; not changed.
    batch, tokens : int
        Rows, and tokens in each row.
    rounds : int
        Measured steps of each form, after two warm-up steps; the forms take turns.
    threads : int
        Torch's threads.
    keep : float
        Share of the linear weights that the third form keeps; its ranks are uniform and frozen.

    Returns
    -------
    dict
        "dense", "soft, full rank" and "soft, at the budget": `rounds` seconds each.

    Raises
    ------
    ValueError
        A number below 1.
    """
    check_at_least_one(batch=batch, tokens=tokens, rounds=rounds, threads=threads)
    costs = parameter_costs({target.name: target.shape for target in find_targets(model)})
    ranks = uniform_ranks(costs, Budget(keep, "linear").limit(costs))
    full, budget = decompose(copy.deepcopy(model)), decompose(copy.deepcopy(model))
    for name, layer in soft_layers(budget).items():
        layer.set_rank_(ranks[name])
        layer.freeze_()
    inputs = random_rows(model.config.vocab_size, batch, tokens) | {"labels": torch.zeros(batch, dtype=torch.long)}
    models = {"dense": copy.deepcopy(model), "soft, full rank": full, "soft, at the budget": budget}
    steps = {name: _step(model, inputs) for name, model in models.items()}
    with use_threads(threads):
        return interleaved(steps, rounds, "timing training steps")


def scan_times(
    *,
    hidden: int = 256,
    layers: int = 6,
    batch: int = 16,
    tokens: int = 128,
    rounds: int = 3,
    threads: int = 2,
    inference: bool = False,
) -> dict[str, list[float]]:
    """Seconds of Mamba's training step with each selective scan; see `step_times`.

    Parameters
    ----------
    hidden, layers, batch, tokens, rounds, threads : int
        With these defaults a step of the plain loop takes most of a minute.
    inference : bool
        Time a forward pass without gradients instead.

    Returns
    -------
    dict
        "transformers' loop", "mambapy" (transformers' ``use_mambapy``, if installed) and "softlms".

    Raises
    ------
    ValueError
        A number below 1.
    """
    check_at_least_one(hidden=hidden, layers=layers, batch=batch, tokens=tokens, rounds=rounds, threads=threads)
    inputs = random_rows(4096, batch, tokens)
    inputs["labels"] = inputs["input_ids"]
    calls = {}
    for name in ("transformers' loop", "mambapy", "softlms"):
        if name == "mambapy" and importlib.util.find_spec("mambapy") is None:
            continue
        config = MambaConfig(
            vocab_size=4096, hidden_size=hidden, num_hidden_layers=layers, use_mambapy=name == "mambapy"
        )
        model = MambaForCausalLM(config)
        call = torch.inference_mode()(partial(model.eval(), **inputs)) if inference else _step(model, inputs)
        calls[name] = fast_scan()(call) if name == "softlms" else call
    with use_threads(threads):
        return interleaved(calls, rounds, "timing Mamba's selective scans")


def training_memory(
    model: str, form: str, *, layers: int | None = None, batch: int = 1, tokens: int = 128
) -> dict[str, Any]:
    """Memory of a training step in fp32 with AdamW: counted, and measured if it fits this machine.

    Parameters
    ----------
    model : str
        A key of `softlms.experiments.full_size.FULL_SIZE`; random weights.
    form : {"dense", "soft", "deployed"}
        Dense; soft at full rank, as at the start of training; or deployed at half of the total parameters.
    layers : int, optional
        Number of blocks to use (dense and soft only).
    batch, tokens : int
        Rows, and tokens in each row; the memory of activations grows with both.

    Returns
    -------
    dict
        Among others "parameters", those that are trained; "states_gb", their weights, gradients and moments; and
        "peak_gb" of this process after one step, NaN if the states exceed nine tenths of the machine's memory. Call
        it in a fresh process: the peak includes everything that ran before.

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


def print_step_times(
    *, model: str = "minilm", batch: int = 16, tokens: int = 64, rounds: int = 15, threads: int = 1, out: str = ""
) -> None:
    """Run ``softlms benchmark``: print the times of `step_times`, and write them to the CSV file `out`."""
    encoder = find_encoder(model)
    seconds = step_times(encoder.for_task(TASKS["mrpc"]), batch=batch, tokens=tokens, rounds=rounds, threads=threads)
    settings = {"encoder": encoder.source, "batch": batch, "tokens": tokens, "threads": threads, "rounds": rounds}
    title = f"training step: {encoder.source}, {batch} x {tokens} tokens, {threads} thread(s), fp32, {rounds} rounds"
    _print_times(seconds, title, settings, out)


def print_scan_times(
    *, batch: int = 16, tokens: int = 128, rounds: int = 3, threads: int = 2, inference: bool = False, out: str = ""
) -> None:
    """Run ``softlms benchmark-scan``: print the times of `scan_times`, and write them to the CSV file `out`."""
    sizes = {"hidden": 256, "layers": 6, "batch": batch, "tokens": tokens, "threads": threads, "rounds": rounds}
    seconds = scan_times(**sizes, inference=inference)
    what = "forward pass" if inference else "training step"
    title = f"Mamba's {what}: hidden 256, 6 layers, {batch} x {tokens} tokens, {threads} thread(s), fp32"
    _print_times(seconds, title, sizes | {"inference": inference}, out)


def print_training_memory(*, model: str, form: str, out: str = "", **options: Any) -> None:
    """Run ``softlms training-memory``: print what `training_memory` found, and add a row to the CSV file `out`."""
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


def _print_times(seconds: Mapping[str, list[float]], title: str, settings: Mapping[str, Any], out: str) -> None:
    """Print the times, also as shares of the first, and write them to a CSV file, replacing an existing one."""
    reference = next(iter(seconds))
    table = Table("form", "median ms", "quartiles ms", f"of {reference}", title=title)
    rows = []
    for form, times in summarize_times(seconds).items():
        share = 1 / times.pop("speed_up")
        middle, low, high = times.values()
        table.add_row(form, f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{share:.3g}")
        rows.append({"form": form, **times, f"of_{reference}": share})
    Console().print(table)
    if out:
        made = {"hardware": hardware(settings["threads"]), "versions": versions()}
        append_rows(out, pd.DataFrame(rows).assign(**settings, **made), anew=True)


def _step(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


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
