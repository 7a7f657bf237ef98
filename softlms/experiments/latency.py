"""How long a training step or a forward pass takes: forms take turns, one thread, median."""

from __future__ import annotations

import copy
import csv
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from softlms.architectures import find_targets
from softlms.budget import Budget, parameter_costs, uniform_ranks
from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS
from softlms.experiments.provenance import commit
from softlms.kernels.selective_scan import fast_scan
from softlms.machine import hardware, use_threads, versions
from softlms.measure import interleaved, random_rows
from softlms.ranges import check_at_least_one
from softlms.surgery import decompose, soft_layers

__all__ = ["forward_times", "print_scan_times", "print_step_times", "scan_times", "step_times"]


def step_times(
    model: PreTrainedModel, *, batch: int = 16, tokens: int = 64, rounds: int = 15, threads: int = 1, keep: float = 0.5
) -> dict[str, list[float]]:
    """Seconds of each training step: forward, backward, clipping, AdamW.

    Parameters
    ----------
    model : PreTrainedModel
        Dense classifier; it is not changed.
    batch, tokens : int
        Rows a batch and tokens a row.
    rounds : int
        Measured steps of each form, after two that warm up; the forms take turns.
    threads : int
        Of torch, restored afterwards.
    keep : float
        Share of the linears in the third form, cut to uniform ranks and frozen.

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
    shapes = {target.name: target.shape for target in find_targets(model)}
    costs = parameter_costs(shapes)
    ranks = uniform_ranks(costs, Budget(keep, "linear").limit(costs))
    full, budget = decompose(copy.deepcopy(model)), decompose(copy.deepcopy(model))
    for name, layer in soft_layers(budget).items():
        layer.set_rank_(ranks[name])
        layer.freeze_()
    inputs = random_rows(model.config.vocab_size, batch, tokens) | {"labels": torch.zeros(batch, dtype=torch.long)}
    models = {"dense": copy.deepcopy(model), "soft, full rank": full, "soft, at the budget": budget}
    steps = {name: _step(model, inputs) for name, model in models.items()}

    return _interleaved(steps, rounds, threads, "timing training steps")


def forward_times(
    models: Mapping[str, PreTrainedModel], inputs: Mapping[str, Tensor], *, rounds: int = 15, threads: int = 1
) -> dict[str, list[float]]:
    """Seconds of each forward pass: models take turns, `rounds` measured after two that warm up.

    Parameters
    ----------
    models : mapping
        In eval mode.
    inputs : mapping
        As from `random_rows`.
    rounds, threads
        As in `step_times`.
    """
    calls = {name: _forward(model, inputs) for name, model in models.items()}
    return _interleaved(calls, rounds, threads, "timing forwards")


def _interleaved(
    calls: Mapping[str, Callable[[], None]], rounds: int, threads: int, description: str
) -> dict[str, list[float]]:
    with use_threads(threads):
        return interleaved(calls, rounds, description)


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
    """Seconds of Mamba's training step, or forward pass, with each selective scan, as in `step_times`.

    Parameters
    ----------
    hidden, layers, batch, tokens, rounds, threads : int
        The plain loop's step takes most of a minute at the sizes given here.
    inference : bool
        A forward pass without gradients instead, as in `forward_times`.

    Returns
    -------
    dict
        "transformers' loop", "mambapy" (transformers' ``use_mambapy``, where it is installed) and "softlms".

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
        call = _forward(model.eval(), inputs) if inference else _step(model, inputs)
        calls[name] = fast_scan()(call) if name == "softlms" else call
    return _interleaved(calls, rounds, threads, "timing Mamba's selective scans")


def print_step_times(
    *, model: str = "minilm", batch: int = 16, tokens: int = 64, rounds: int = 15, threads: int = 1, out: str = ""
) -> None:
    """The ``softlms benchmark`` command: a table of `step_times`, and the same as CSV where `out` names a file."""
    encoder = find_encoder(model)
    seconds = step_times(encoder.for_task(TASKS["mrpc"]), batch=batch, tokens=tokens, rounds=rounds, threads=threads)
    settings = {"encoder": encoder.source, "batch": batch, "tokens": tokens, "threads": threads, "rounds": rounds}
    title = f"training step: {encoder.source}, {batch} x {tokens} tokens, {threads} thread(s), fp32, {rounds} rounds"
    _print_times(seconds, "dense", title, settings, out)


def print_scan_times(
    *, batch: int = 16, tokens: int = 128, rounds: int = 3, threads: int = 2, inference: bool = False, out: str = ""
) -> None:
    """The ``softlms benchmark-scan`` command: `scan_times` as `print_step_times` shows them."""
    sizes = {"hidden": 256, "layers": 6, "batch": batch, "tokens": tokens, "threads": threads, "rounds": rounds}
    settings = sizes | {"inference": inference}
    seconds = scan_times(**sizes, inference=inference)
    what = "forward pass" if inference else "training step"
    title = f"Mamba's {what}: hidden 256, 6 layers, {batch} x {tokens} tokens, {threads} thread(s), fp32"
    _print_times(seconds, "transformers' loop", title, settings, out)


def _print_times(
    seconds: Mapping[str, list[float]], reference: str, title: str, settings: Mapping[str, Any], out: str
) -> None:
    base = statistics.median(seconds[reference])
    table = Table("form", "median ms", "quartiles ms", f"of {reference}", title=title)
    rows = []
    for name, taken in seconds.items():
        low, middle, high = [1e3 * q for q in (statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3)]
        share = middle / (1e3 * base)
        table.add_row(name, f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{share:.3g}")
        rows.append([name, f"{middle:.1f}", f"{low:.1f}", f"{high:.1f}", f"{share:.4g}"])
    Console().print(table)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with Path(out).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            origin = dict(settings) | {
                "hardware": hardware(settings["threads"]),
                "versions": versions(),
                "commit": commit(),
            }
            writer.writerow(["form", "median_ms", "quartile1_ms", "quartile3_ms", f"of_{reference}", *origin])
            writer.writerows([*row, *origin.values()] for row in rows)


def _forward(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    return forward


def _step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
