"""How much faster compressed models are, and why not more; dense and thin forms take turns in one run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation

from softlms.architectures import find_targets
from softlms.budget import Costs, count_parameters, parameter_costs
from softlms.data.encoders import find_encoder
from softlms.data.hub import pretrained
from softlms.data.inputs import prepared
from softlms.data.tasks import encode, load_task
from softlms.experiments.full_size import FULL_SIZE, find_full_size, half_ranks, spread_blocks
from softlms.experiments.provenance import append_rows
from softlms.experiments.timing import summarize_times
from softlms.export import example_rows, export_onnx, onnx_session, without_notices
from softlms.kernels.allocator import keep_memory
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import LowRankLinear
from softlms.lowrank.allocation import allocate
from softlms.lowrank.calibration import calibrate
from softlms.lowrank.factorization import factorize
from softlms.measure import count_flops, interleaved, measure_latency, random_rows
from softlms.surgery import shrink, truncate
from softlms.utils.machine import hardware, use_threads, versions
from softlms.utils.ranges import check_at_least_one

__all__ = ["compare_budgets", "compare_onnx", "compare_speed", "print_speed", "split_speed"]

CALIBRATION_ROWS, HELD_OUT_ROWS = 128, 64


def compare_speed(
    model: str,
    *,
    layers: int | None = None,
    keep: float = 0.5,
    results: Path | None = None,
    batches: Sequence[int] = (1, 8),
    tokens: int = 128,
    threads: Sequence[int] = (1,),
    rounds: int = 9,
    decode: bool = True,
) -> pd.DataFrame:
    """Time forward passes of the dense model and of thin ones that keep a share of it; fp32, or bf16 on a GPU.

    All forms run inside `fast_scan` and `keep_memory`.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`; random weights.
    layers : int, optional
        Number of blocks to use.
    keep : float
        Share of the total parameters.
    results : Path, optional
        See `half_ranks`; adds the form "trained ranks" to "uniform ranks".
    batches, threads : sequence of int
        All values are measured.
    tokens : int
        Tokens per row, in a prefill and in the cache read by a decoding step.
    rounds : int
        Measured calls, after one warm-up call.
    decode : bool
        Also time one token with a cache, at batch 1 (BERT has no cache: one token alone).

    Returns
    -------
    DataFrame
        One row for each form, part ("stack", the blocks and the norms around them, or "model", end to end), phase
        ("prefill" or "decode"), batch and number of threads: median and quartiles in ms; "speed_up" over dense; the
        speed-up if only FLOPs took time ("flop_limit"); the speed-up if the head and each target layer took the
        longer of the times for their FLOPs and for reading their weights, and the rest the time for its FLOPs, at
        this machine's measured peak and bandwidth ("roofline_limit"); and where it was measured.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown model, a number out of range, or no table of ranks.
    """
    check_at_least_one(batches=min(batches), threads=min(threads), tokens=tokens, rounds=rounds)
    forms = _forms(model, layers=layers, keep=keep, results=results)
    rows = []
    with torch.inference_mode(), fast_scan(), keep_memory():
        for number, case in product(threads, _cases(forms, batches, tokens, decode)):
            with use_threads(number):
                counted = forms["dense"].base_model if case.part == "stack" else forms["dense"]
                rest = count_flops(counted, batch=case.batch, tokens=case.tokens).rest
                machine = _machine()
                limits = {form: _limits(network, case, rest, *machine) for form, network in forms.items()}
                seconds = interleaved(case.calls, rounds, f"{model}: {case.part}, {case.phase}, {case.batch} row(s)", 1)
            for form, times in summarize_times(seconds).items():
                rows.append(
                    {
                        "model": model,
                        "form": form,
                        "part": case.part,
                        "phase": case.phase,
                        "batch": case.batch,
                        "tokens": tokens,
                        "threads": number,
                        **times,
                        "flop_limit": limits["dense"][0] / limits[form][0],
                        "roofline_limit": limits["dense"][1] / limits[form][1],
                        "parameters": count_parameters(forms[form]).total,
                        "blocks": forms["dense"].config.num_hidden_layers,
                        "rounds": rounds,
                        "hardware": hardware(number),
                        "versions": versions(),
                    }
                )
    return pd.DataFrame(rows)


def split_speed(
    model: str,
    *,
    layers: int | None = None,
    keep: float = 0.5,
    results: Path | None = None,
    tokens: int = 128,
    rounds: int = 9,
) -> pd.DataFrame:
    """Time the blocks, and their linear layers alone, on random inputs; one row, one thread.

    Parameters
    ----------
    model, layers, keep, results, tokens, rounds
        See `compare_speed`.

    Returns
    -------
    DataFrame
        A row for each form: milliseconds of the blocks ("blocks_ms"), of their linear layers ("linears_ms") and of the
        rest ("rest_ms"), GFLOPs per second in the linear layers ("gflops_per_s"), the speed-up over dense of the
        blocks ("speed_up") and of their linear layers ("linears_speed_up"), and the latter if only FLOPs took time
        ("linears_flop_limit").

    Raises
    ------
    ValueError, FileNotFoundError
        As from `compare_speed`.
    """
    check_at_least_one(tokens=tokens, rounds=rounds)
    forms = _forms(model, layers=layers, keep=keep, results=results)
    states = torch.randn(1, tokens, forms["dense"].config.hidden_size, device=forms["dense"].device)
    states = states.to(forms["dense"].dtype)
    calls: dict[str, Callable[[], object]] = {}
    for form, network in forms.items():
        calls[f"{form}, blocks"] = partial(network.base_model, inputs_embeds=states)
        calls[f"{form}, linears"] = _linears(network, tokens)
    with torch.inference_mode(), fast_scan(), keep_memory(), use_threads(1):
        seconds = interleaved(calls, rounds, f"{model}: blocks and their linear layers", 1)
    taken = {name: times["median_ms"] for name, times in summarize_times(seconds).items()}
    flops = {form: 2 * tokens * sum(w.numel() for w in _linear_weights(network)) for form, network in forms.items()}
    rows = []
    for form in forms:
        blocks, linears = taken[f"{form}, blocks"], taken[f"{form}, linears"]
        rows.append(
            {
                "model": model,
                "form": form,
                "tokens": tokens,
                "blocks_ms": blocks,
                "linears_ms": linears,
                "rest_ms": blocks - linears,
                "gflops_per_s": flops[form] / linears / 1e6,
                "speed_up": taken["dense, blocks"] / blocks,
                "linears_speed_up": taken["dense, linears"] / linears,
                "linears_flop_limit": flops["dense"] / flops[form],
            }
        )
    return pd.DataFrame(rows)


def compare_onnx(
    model: str,
    *,
    layers: int | None = None,
    keep: float = 0.5,
    results: Path | None = None,
    tokens: int = 128,
    rounds: int = 9,
) -> pd.DataFrame:
    """Time the forms under onnxruntime, with float32 and with 8-bit weights; one row, one thread.

    Parameters
    ----------
    model, layers, keep, results, tokens, rounds
        See `compare_speed`.

    Returns
    -------
    DataFrame
        One row for each form and kind of weights: the median in ms, "speed_up" over dense float32, and the file's size
        in MB.
    """
    check_at_least_one(tokens=tokens, rounds=rounds)
    forms = _forms(model, layers=layers, keep=keep, results=results)
    inputs = {name: values.numpy() for name, values in example_rows(forms["dense"], 1, tokens).items()}
    calls, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for (form, network), int8 in product(forms.items(), (False, True)):
            name = f"{form}, int8" if int8 else form
            with without_notices():  # about rounding: meaningless for random weights
                path = export_onnx(network, Path(folder) / f"{name.replace(' ', '-')}.onnx", int8=int8)
            sizes[name] = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6
            calls[name] = partial(onnx_session(path).run, ["logits"], inputs)
        seconds = interleaved(calls, rounds, f"{model} under onnxruntime")
    rows = [
        {
            "model": model, "form": name, "tokens": tokens, "median_ms": times["median_ms"],
            "speed_up": times["speed_up"], "file_mb": sizes[name], "blocks": layers or "all",
        }
        for name, times in summarize_times(seconds).items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def compare_budgets(
    budgets: Mapping[str, float], *, encoder: str = "minilm", tokens: int = 128, multiple: int = 16, rounds: int = 15
) -> pd.DataFrame:
    """Cut an encoder uniformly under budgets that count different things, and time the results; one row, one thread.

    Parameters
    ----------
    budgets : mapping
        What is counted ("linear", "total", "flops" or "latency") to the share that is kept.
    encoder : str
        See `find_encoder`. Its factors are whitened, calibrated on the embedded sentence pairs.
    tokens, rounds : int
        Tokens in the timed row, and measured calls.
    multiple : int
        See `softlms.Budget`.

    Returns
    -------
    DataFrame
        One row for each budget: "kept_linear" (share of the linear weights), "kept_flops", "predicted_speed_up" (from
        the times of single layers), "speed_up" (of the whole model), "output_error" (relative, of the last hidden
        states on held-out rows; nothing is trained after the cut).

    Raises
    ------
    ValueError
        Unknown encoder, or a budget that cannot be met.
    """
    found = find_encoder(encoder)
    model = pretrained(AutoModel, found.location).eval()
    collator = DataCollatorWithPadding(found.tokenizer())
    rows = encode(load_task("docpairs", "embedded"), found.tokenizer(), 40)
    seen = calibrate(model, rows["train"], collator, rows=CALIBRATION_ROWS)
    factors = factorize(model, "whitened", seen)
    unseen = [{"input_ids": row["input_ids"]} for row in rows["dev"].select(range(HELD_OUT_ROWS))]
    held_out = prepared(model, collator(unseen))
    words = held_out["attention_mask"].bool()

    flops, latency = count_flops(model, tokens=tokens), measure_latency(model, tokens=tokens, rounds=rounds)
    weights = parameter_costs(flops.shapes)
    ranks = {
        count: allocate(
            model, factors, "uniform", keep=keep, count=count, multiple=multiple,
            costs={"flops": flops, "latency": latency}.get(count),
        )
        for count, keep in budgets.items()
    }  # fmt: skip
    forms = {"dense": model} | {count: truncate(copy.deepcopy(model), kept, factors) for count, kept in ranks.items()}
    inputs = random_rows(model.config.vocab_size, 1, tokens)
    with use_threads(1), torch.inference_mode():
        times = summarize_times(interleaved({name: partial(form, **inputs) for name, form in forms.items()}, rounds))
        states = {name: form(**held_out).last_hidden_state[words] for name, form in forms.items()}
    return pd.DataFrame(
        {
            "budget": f"{budgets[count]:.0%} of {count}",
            "kept_linear": weights.of(kept) / weights.dense,
            "kept_flops": (flops.rest + flops.of(kept)) / flops.dense,
            "predicted_speed_up": latency.dense / (latency.rest + latency.of(kept)),
            "speed_up": times[count]["speed_up"],
            "output_error": float((states[count] - states["dense"]).norm() / states["dense"].norm()),
        }
        for count, kept in ranks.items()
    )


def print_speed(
    *,
    models: Sequence[str],
    results: str = "",
    out: str = "",
    two_threads: bool = False,
    **options: Any,
) -> None:
    """Run ``softlms benchmark-speed``: print a table for each model, and add its rows to the CSV file `out`."""
    for model in models or FULL_SIZE:
        table = compare_speed(
            model,
            results=Path(results) if results else None,
            threads=(1, 2) if two_threads else (1,),
            **options,
        )
        shown = Table(*("form", "part", "phase", "batch", "threads", "ms", "speed-up", "FLOP limit"), title=model)
        for row in table.itertuples():
            shown.add_row(
                row.form, row.part, row.phase, str(row.batch), str(row.threads), f"{row.median_ms:.1f}",
                f"{row.speed_up:.2f}", f"{row.flop_limit:.2f}",
            )  # fmt: skip
        Console().print(shown)
        if out:
            append_rows(out, table)


@dataclass(frozen=True)
class _Case:
    """A workload that each form runs in turn."""

    part: str
    phase: str
    batch: int
    tokens: int  # computed per row in one call
    calls: Mapping[str, Callable[[], Any]]


def _forms(
    model: str, *, layers: int | None = None, keep: float = 0.5, results: Path | None = None
) -> dict[str, PreTrainedModel]:
    """The models to compare, with random weights; a layer that factors would slow down at one token stays dense."""
    if model not in FULL_SIZE:
        raise ValueError(f"Unknown model {model!r}; known: {', '.join(FULL_SIZE)}.")
    create, _ = find_full_size(model, layers)
    dense = _form(create, {})
    with torch.device("meta"):
        skeleton = find_full_size(model, None)[0](None)
    few = measure_latency(dense, tokens=1)
    by_shape = {few.shapes[name]: price for name, price in few.prices.items()}
    shapes = {target.name: target.shape for target in find_targets(skeleton)}
    measured = Costs("latency", shapes, {name: by_shape[shape] for name, shape in shapes.items()})
    ranks = {"uniform ranks": half_ranks(model, skeleton, keep=keep, measured=measured)}
    if results is not None:
        ranks["trained ranks"] = half_ranks(model, skeleton, keep=keep, results=results, measured=measured)
    return {"dense": dense} | {form: _form(create, chosen) for form, chosen in ranks.items()}


def _form(create: Callable[[str | None], PreTrainedModel], ranks: Mapping[str, int]) -> PreTrainedModel:
    """A model with random weights, dense or of these ranks."""
    torch.manual_seed(0)
    model = create(None).eval()
    if ranks:
        shrink(model, spread_blocks(ranks, [target.name for target in find_targets(model)]))
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):  # the same function in one operation instead of eight
            model.set_submodule(name, GELUTanh())
    return model.to("cuda", torch.bfloat16) if torch.cuda.is_available() else model


def _cases(forms: Mapping[str, PreTrainedModel], batches: Sequence[int], tokens: int, decode: bool) -> Iterator[_Case]:
    config = forms["dense"].config
    device = forms["dense"].device
    for batch in batches:
        inputs = {name: values.to(device) for name, values in random_rows(config.vocab_size, batch, tokens).items()}
        states = torch.randn(batch, tokens, config.hidden_size, device=device, dtype=forms["dense"].dtype)
        stack = {form: partial(model.base_model, inputs_embeds=states) for form, model in forms.items()}
        yield _Case("stack", "prefill", batch, tokens, stack)
        calls: Mapping[str, Callable[[], Any]] = {form: partial(model, **inputs) for form, model in forms.items()}
        yield _Case("model", "prefill", batch, tokens, calls)
    if decode:
        calls = {form: _decoding(model, tokens) for form, model in forms.items()}
        yield _Case("model", "decode", 1, 1, calls)


def _linears(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """A function that calls all target layers, one after the other."""
    targets = find_targets(model)
    widths = {target.shape[1] for target in targets}
    inputs = {n: torch.randn(1, tokens, n, device=model.device, dtype=model.dtype) for n in widths}

    def run() -> None:
        for target in targets:
            target.module(inputs[target.shape[1]])

    return run


def _linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """Matrices of the target layers: a dense layer's weight, a thin layer's two factors."""
    layers = [target.module for target in find_targets(model)]
    parts = [part for m in layers for part in ((m.down, m.up) if isinstance(m, LowRankLinear) else (m,))]
    return [part.weight for part in parts]


def _limits(model: PreTrainedModel, case: _Case, rest: float, peak: float, bandwidth: float) -> tuple[float, float]:
    """FLOPs of a case, and its seconds by the roofline model; both without elementwise work and the scan."""
    rows = case.batch * case.tokens
    weights = _linear_weights(model)
    head = model.get_output_embeddings() if case.part == "model" else None
    if head is not None:  # a product too, with the largest weight
        weights.append(head.weight)
        rest -= 2 * rows * head.weight.numel()
    flops = rest + sum(2 * rows * w.numel() for w in weights)
    seconds = rest / peak + sum(max(2 * rows * w.numel() / peak, w.nbytes / bandwidth) for w in weights)
    return flops, seconds


def _machine() -> tuple[float, float]:
    """FLOPs per second of a large product, and bytes per second of reading more than a cache holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    square, long = torch.randn(1536, 1536, device=device, dtype=dtype), torch.ones(1 << 26, device=device)
    taken = interleaved({"product": lambda: square @ square, "reading": long.sum}, 5)
    return 2 * 1536**3 / min(taken["product"]), long.nbytes / min(taken["reading"])


def _decoding(model: PreTrainedModel, tokens: int) -> Callable[[], Any]:
    """A function that decodes one token after a cache of `tokens`; BERT has no cache: one token alone."""
    inputs = random_rows(model.config.vocab_size, 1, tokens)
    one = random_rows(model.config.vocab_size, 1, 1)["input_ids"].to(model.device)
    if not model.can_generate():
        return partial(model, input_ids=one)
    with torch.inference_mode():
        cache = model(**{name: values.to(model.device) for name, values in inputs.items()}, use_cache=True)
    if "cache_params" in cache:
        return partial(model, input_ids=one, cache_params=cache.cache_params, use_cache=True)
    past = cache.past_key_values

    def step() -> None:
        model(input_ids=one, past_key_values=past, use_cache=True)
        past.crop(-1)

    return step
