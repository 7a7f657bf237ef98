"""How much faster the compressed models are, at the paper's real sizes: dense and thin take turns in one run."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
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
from torch.nn.functional import linear
from transformers import LlamaConfig, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from softlms.architectures import find_targets
from softlms.budget import Costs, count_parameters
from softlms.experiments.full_size import FULL_SIZE, find_full_size
from softlms.experiments.provenance import append_rows
from softlms.experiments.stretch import half_ranks, spread_blocks
from softlms.export import example_rows, export_onnx, onnx_session, without_notices
from softlms.kernels.allocator import keep_memory
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import LowRankLinear
from softlms.machine import hardware, use_threads, versions
from softlms.measure import count_flops, interleaved, measure_latency, random_rows
from softlms.ranges import check_at_least_one
from softlms.surgery import shrink

__all__ = [
    "build_forms",
    "compare_onnx",
    "compare_speed",
    "linear_weights",
    "print_speed",
    "time_tricks",
]


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
    """Time the dense model against thin ones of half its parameters: forward passes in turn, fp32 (bf16 on a GPU).

    All forms run inside `softlms.fast_scan` and `softlms.keep_memory`.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`; random weights.
    layers : int, optional
        Only so many blocks.
    keep : float
        Share of the total parameters.
    results : Path, optional
        See `half_ranks`; with it a form "trained ranks" beside "uniform ranks".
    batches, threads : sequence of int
        Each of them is measured.
    tokens : int
        Tokens a row, of a prefill and of the cache that a decoding step reads.
    rounds : int
        Measured calls, after one that warms up.
    decode : bool
        Also time one token with a cache, at batch 1 (for BERT, which has none, one token alone).

    Returns
    -------
    DataFrame
        A row for each form ("dense", "uniform ranks", "trained ranks"), part ("stack", the blocks and the norms around
        them, or "model", end to end), phase ("prefill" or "decode"), batch and number of threads: median and quartiles
        in ms, "speed_up" over dense, the speed-up if only FLOPs took time ("flop_limit"), or if the head and each layer
        that is factored took what its FLOPs or its weights take, whichever is longer, and all else its FLOPs, at the
        peak and bandwidth that this machine shows ("roofline_limit"), and where all this was measured.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown model, a number out of range, or no table of ranks.
    """
    check_at_least_one(batches=min(batches), threads=min(threads), tokens=tokens, rounds=rounds)
    forms = build_forms(model, layers=layers, keep=keep, results=results)
    rows = []
    with torch.inference_mode(), fast_scan(), keep_memory():
        for number, case in product(threads, _cases(forms, batches, tokens, decode)):
            with use_threads(number):
                counted = forms["dense"].base_model if case.part == "stack" else forms["dense"]
                rest = count_flops(counted, batch=case.batch, tokens=case.tokens).rest
                machine = _machine()
                limits = {form: _limits(network, case, rest, *machine) for form, network in forms.items()}
                seconds = interleaved(case.calls, rounds, f"{model}: {case.part}, {case.phase}, {case.batch} row(s)", 1)
            dense = statistics.median(seconds["dense"])
            for form, taken in seconds.items():
                low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
                rows.append(
                    {
                        "model": model,
                        "form": form,
                        "part": case.part,
                        "phase": case.phase,
                        "batch": case.batch,
                        "tokens": tokens,
                        "threads": number,
                        "median_ms": 1e3 * middle,
                        "quartile1_ms": 1e3 * low,
                        "quartile3_ms": 1e3 * high,
                        "speed_up": dense / middle,
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


def build_forms(
    model: str, *, layers: int | None = None, keep: float = 0.5, results: Path | None = None
) -> dict[str, PreTrainedModel]:
    """The models that are compared, with random weights and in eval mode; see `compare_speed`.

    Layers that two factors would make slower at one token, by measured time, stay dense and count so.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown model, or no table of ranks.
    """
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


def linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """What the linear layers multiply with: a dense layer's weight, a thin one's two factors."""
    layers = [target.module for target in find_targets(model)]
    parts = [part for m in layers for part in ((m.down, m.up) if isinstance(m, LowRankLinear) else (m,))]
    return [part.weight for part in parts]


def compare_onnx(
    model: str,
    *,
    layers: int | None = None,
    keep: float = 0.5,
    results: Path | None = None,
    tokens: int = 128,
    rounds: int = 9,
) -> pd.DataFrame:
    """The same under onnxruntime, with float32 and with 8-bit weights: one row of tokens, one thread.

    Parameters
    ----------
    model, layers, keep, results, tokens, rounds
        See `compare_speed`.

    Returns
    -------
    DataFrame
        A row for each form and kind of weights: the median in ms, "speed_up" over dense float32, and the file's size
        in MB.
    """
    check_at_least_one(tokens=tokens, rounds=rounds)
    forms = build_forms(model, layers=layers, keep=keep, results=results)
    inputs = {name: values.numpy() for name, values in example_rows(forms["dense"], 1, tokens).items()}
    calls, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for (form, network), int8 in product(forms.items(), (False, True)):
            name = f"{form}, int8" if int8 else form
            with without_notices():  # weights are random here: what rounding does to them means nothing
                path = export_onnx(network, Path(folder) / f"{name.replace(' ', '-')}.onnx", int8=int8)
            sizes[name] = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6
            calls[name] = partial(onnx_session(path).run, ["logits"], inputs)
        seconds = interleaved(calls, rounds, f"{model} under onnxruntime")
    dense = statistics.median(seconds["dense"])
    rows = [
        {
            "model": model, "form": name, "tokens": tokens, "median_ms": 1e3 * statistics.median(taken),
            "speed_up": dense / statistics.median(taken), "file_mb": sizes[name], "blocks": layers or "all",
        }
        for name, taken in seconds.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def time_tricks(*, tokens: int = 128, rounds: int = 21) -> pd.DataFrame:
    """What single tricks are worth, each alone, at the models' layer sizes; one thread, fp32.

    Parameters
    ----------
    tokens : int
        In one row.
    rounds : int
        Interleaved, after two that warm up.

    Returns
    -------
    DataFrame
        "trick", microseconds without and with it ("without_us", "with_us", medians), and "gain", their ratio.
    """
    x, wide = torch.randn(1, tokens, 768), torch.randn(1, tokens, 3072)
    odd, even = (LowRankLinear(torch.randn(r, 768), torch.randn(768, r), torch.zeros(768)) for r in (127, 128))
    downs = [torch.randn(96, 768) for _ in range(3)]
    ups = [torch.randn(768, 96) for _ in range(3)]
    stacked = torch.cat(downs)

    def apart() -> None:
        for down, up in zip(downs, ups, strict=True):
            linear(linear(x, down), up)

    def together() -> None:
        for down, up in zip(linear(x, stacked).chunk(3, -1), ups, strict=True):
            linear(down, up)

    tricks: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "rank 128 instead of 127 (768 x 768)": (partial(odd, x), partial(even, x)),
        "down-projections of Q, K, V in one product (rank 96)": (apart, together),
        "GPT-2's GELU in one pass": (partial(NewGELUActivation(), wide), partial(GELUTanh(), wide)),
    }
    rows = []
    with torch.inference_mode(), use_threads(1):
        for name, (without, using) in tricks.items():
            seconds = interleaved({"without": without, "with": using}, rounds)
            us = {f"{key}_us": 1e6 * statistics.median(taken) for key, taken in seconds.items()}
            rows.append({"trick": name, "tokens": tokens} | us)
    us = {f"{key}_us": _in_new_process(_mlp, tokens, rounds, key == "with") for key in ("without", "with")}
    rows.append({"trick": "freed memory kept (TinyLlama's MLP, rank 640)", "tokens": tokens} | us)
    return pd.DataFrame(rows).assign(gain=lambda table: table["without_us"] / table["with_us"])


def print_speed(
    *,
    models: Sequence[str],
    results: str = "",
    out: str = "",
    two_threads: bool = False,
    **options: Any,
) -> None:
    """The ``softlms benchmark-speed`` command: a table for each model; rows go to the CSV that `out` names at once."""
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
    """What is timed in turn: the same work by each form."""

    part: str
    phase: str
    batch: int
    tokens: int  # computed in a row
    calls: Mapping[str, Callable[[], Any]]


def _form(create: Callable[[str | None], PreTrainedModel], ranks: Mapping[str, int]) -> PreTrainedModel:
    """A model with random weights, dense or of these ranks; activations in one pass, for all forms alike."""
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


def _limits(model: PreTrainedModel, case: _Case, rest: float, peak: float, bandwidth: float) -> tuple[float, float]:
    """FLOPs of a case, and the seconds of its roofline; elementwise work and the scan are in neither."""
    rows = case.batch * case.tokens
    weights = linear_weights(model)
    head = model.get_output_embeddings() if case.part == "model" else None
    if head is not None:  # a product like the others, and the largest to read
        weights.append(head.weight)
        rest -= 2 * rows * head.weight.numel()
    flops = rest + sum(2 * rows * w.numel() for w in weights)
    seconds = rest / peak + sum(max(2 * rows * w.numel() / peak, w.nbytes / bandwidth) for w in weights)
    return flops, seconds


def _in_new_process(measure: Callable[..., float], *arguments: object) -> float:
    """How an allocator serves a call depends on what the process freed before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def _mlp(tokens: int, rounds: int, keep: bool) -> float:
    """Microseconds of an MLP of TinyLlama's size, its three layers of rank 640."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=2048, intermediate_size=5632))
    for name in ("gate_proj", "up_proj", "down_proj"):
        m, n = mlp.get_submodule(name).weight.shape
        mlp.set_submodule(name, LowRankLinear(torch.randn(640, n), torch.randn(m, 640), None))
    x = torch.randn(1, tokens, 2048)
    with torch.inference_mode(), use_threads(1), keep_memory() if keep else nullcontext():
        return 1e6 * statistics.median(interleaved({"": partial(mlp, x)}, rounds)[""])


def _machine() -> tuple[float, float]:
    """FLOPs a second of a large product, and bytes a second of reading more than a cache holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    square, long = torch.randn(1536, 1536, device=device, dtype=dtype), torch.ones(1 << 26, device=device)
    taken = interleaved({"product": lambda: square @ square, "reading": long.sum}, 5)
    return 2 * 1536**3 / min(taken["product"]), long.nbytes / min(taken["reading"])


def _decoding(model: PreTrainedModel, tokens: int) -> Callable[[], Any]:
    """One token more, from a cache of so many; of a BERT, which has none, one token alone."""
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
