"""The tables of ``docs/results.md``, each made in Markdown from the committed rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from softlms.experiments.full_size import FULL_SIZE
from softlms.experiments.grid import CUT_FROM, UNSCALED
from softlms.lowrank.allocation import ALLOCATIONS
from softlms.lowrank.factorization import FACTORIZATIONS
from softlms.workbook.claims import judge, load_claims

__all__ = ["TABLES"]

SEEDS = 3  # of every grid; a cell with fewer shows its number
SIGNS = {"at_least": "≥ ", "at_most": "≤ ", "equals": "", "": ""}


@dataclass(frozen=True)
class Scored:
    """A task: what its scores are called, the notebook that wrote them, and which of them are shown."""

    name: str
    book: str
    metric: str
    split: str = "test"


TASKS = {
    "mrpc": Scored("MRPC F1", "05_bert_table", "f1"),
    "sst2": Scored("SST-2 accuracy", "05_bert_table", "accuracy", "dev"),
    "rte": Scored("RTE accuracy", "05_bert_table", "accuracy", "dev"),
    "gpt2": Scored("GPT-2 perplexity", "06_gpt2_table", "perplexity"),
    "llama": Scored("Llama perplexity", "07_tinyllama_table", "perplexity"),
    "mamba": Scored("Mamba perplexity", "08_mamba_table", "perplexity"),
    "smollm2": Scored("SmolLM2 perplexity", "07_tinyllama_table_smollm2", "perplexity"),
    "smollm2 on dev": Scored("SmolLM2 perplexity", "07_tinyllama_table_smollm2", "perplexity", "dev"),
    "smollm2 elsewhere": Scored("Shakespeare", "07_tinyllama_table_smollm2", "perplexity", "tinyshakespeare"),
    "smollm2 asked": Scored("SST-2 accuracy", "07_tinyllama_table_smollm2", "accuracy", "sst2 zero-shot"),
}
HEADLINE = {
    "dense": "dense",
    "svd+uniform": "SVD, the same share everywhere",
    "whitened+uniform": "whitened SVD, the same share everywhere",
    "whitened+mask": "whitened SVD, learned masks",
    "whitened+soft": "**whitened SVD, learned ranks**",
}


def rows(results: Path, file: str, header: str, line: str, where: str = "") -> str:
    """The rows of a file, each as a line whose fields are its columns; those that meet a condition, if there is one."""
    table = pd.read_csv(results / file)
    return _table(table.query(where) if where else table, header, line)


def headline(results: Path) -> str:
    """Half of the linears' weights kept: what methods score on five tasks."""
    tasks = ("mrpc", "sst2", "gpt2", "llama", "mamba")
    scores = _scores(results, [(task, 0.5) for task in tasks]).loc[list(HEADLINE)].rename(HEADLINE)
    return _markdown(["method", *(TASKS[task].name for task in tasks)], scores.itertuples())


def static_and_adaptive(results: Path) -> str:
    """Notebook 04's scores."""
    rows = pd.read_csv(results / "laptop/04_static_vs_adaptive_rank.csv")
    kept = rows.groupby("method")[["kept_linear", "kept_total"]].mean()
    removed = (1 - kept).rename(columns={"kept_linear": "removed_linear", "kept_total": "removed_total"})
    scores = rows.pivot_table("value", "method", ["split", "metric"], lambda values: _cell(100 * values, 1))
    return _table(
        kept.join(removed).join(_flat(scores)).loc[["dense", "static", "adaptive"]],
        "method | linears kept | removed | total kept | removed | dev F1 | dev accuracy | test F1 | test accuracy",
        "{method} | {kept_linear:.1%} | {removed_linear:.1%} | {kept_total:.1%} | {removed_total:.1%} | "
        "{dev_f1} | {dev_accuracy} | {test_f1} | {test_accuracy}",
    )


def ablation(results: Path) -> str:
    """Notebook 04's single settings."""
    rows = pd.read_csv(results / "laptop/04_static_vs_adaptive_rank_ablation.csv")
    rows = rows[rows.metric == "f1"].assign(change=100 * (rows.value - rows.recipe_value), f1=100 * rows.value)
    settings = rows.groupby("setting", sort=False)
    counts = settings.agg(seeds=("seed", "nunique"), met=("frozen_at", "mean"), steps=("steps", "first"))
    return _table(
        counts.join(_flat(rows.pivot_table(["f1", "change"], "setting", "split"))),
        "setting | seeds | dev F1 | difference | test F1 | difference | budget met at step",
        "{setting} | {seeds} | {f1_dev:.1f} | {change_dev:+.1f} | {f1_test:.1f} | {change_test:+.1f} | "
        "{met:.0f} of {steps}",
    )


def methods(results: Path, task: str, state: str = "recovered") -> str:
    """Every method, recovered or "untuned", at every budget that has rows."""
    rows = _rows(results, task, state)
    budgets = sorted(rows[rows.method != "dense"].keep.unique(), reverse=True)
    scores = _scores(results, [(task, keep) for keep in budgets], state)
    return _markdown(["method", *(f"{keep:.0%} kept, {1 - keep:.0%} removed" for keep in budgets)], scores.itertuples())


def verdicts(results: Path, *tasks: str) -> str:
    """SoftLMs against its rivals, by task and falling budget; the best other method first."""
    books = dict.fromkeys(TASKS[task].book for task in tasks)
    rows = pd.concat(pd.read_csv(results / f"laptop/{book}_verdicts.csv") for book in books)
    rows = rows.assign(digits=[_unit(task)[1] for task in rows.task])
    return _table(
        rows.sort_values(["task", "keep"], ascending=[True, False], kind="stable"),
        "task | kept | removed | SoftLMs | rival | better by | 95 % interval",
        "{task} | {keep:.0%} | {removed:.0%} | {soft} | {rival} | {difference:+.{digits}f} | "
        "{low95:+.{digits}f} to {high95:+.{digits}f}",
    )


def trials(results: Path) -> str:
    """How many trials the settings of the language models took."""
    rows = pd.read_csv(results / "laptop/language_trials.csv")
    return _table(
        pd.crosstab(rows.family, rows.method.str.partition("+")[2]),
        "model | soft thresholds | uniform ranks | masks",
        "{family} | {soft} | {uniform} | {mask}",
    )


def fused(results: Path) -> str:
    """GPT-2's fused projection, factored whole or taken apart."""
    rows = pd.read_csv(results / "laptop/06_gpt2_table_fused.csv")
    rows = rows[rows.recovered & (rows.split == "test")]
    scores = rows.pivot_table("value", ["method", "c_attn"], aggfunc=lambda values: _cell(values, 2, SEEDS))
    return _table(scores, "method | `c_attn` | perplexity", "{method} | {c_attn} | {value}")


def defaults(results: Path) -> str:
    """The library's defaults on MRPC, less notebook 05's settings, which were tuned by hand."""
    ours = pd.read_csv(results / "defaults.csv")
    tuned = _rows(results, "mrpc")
    tuned = tuned[tuned.allocate == "soft"].assign(factors=tuned.method.str.removesuffix("+soft"))
    both = ours.merge(tuned, on=["factors", "keep", "seed"])
    both = both.assign(defaults=100 * both.test_f1, tuned=100 * both.value, lost=100 * (both.value - both.test_f1))
    scores = {name: (name, lambda values: _cell(values, 1, SEEDS)) for name in ("defaults", "tuned")}
    return _table(
        both.groupby(["factors", "keep"], sort=False).agg(**scores, lost=("lost", "mean")),
        "factors | kept | removed | defaults | tuned by hand | points lost",
        "{factors} | {keep:.0%} | {removed:.0%} | {defaults} | {tuned} | {lost:.1f}",
    )


def language_defaults(results: Path) -> str:
    """The library's defaults on the small language models of profile quick."""
    rows = pd.read_csv(results / "defaults_language.csv")
    table = rows.pivot_table("test_perplexity", ["model", "method", "keep"], "settings")
    return _table(
        table.sort_values(["model", "keep"], ascending=[True, False], kind="stable"),
        "model | method | kept | removed | defaults | tuned for profile laptop",
        "{model} | {method} | {keep:.0%} | {removed:.0%} | {defaults:.2f} | {tuned:.2f}",
    )


def int8(results: Path) -> str:
    """Ways to round weights to 8 bits for onnxruntime."""
    rows = pd.read_csv(results / "export_int8.csv")
    return _table(
        rows.assign(processor=rows.hardware.str.partition(",")[0], f1=100 * rows.f1),
        "processor | weights | basis | test F1 | torch's answer | ms a row",
        "{processor} | {weights} | {basis} | {f1:.1f} | {agreement:.1%} | {median_ms:.0f}",
    )


def full_sizes(results: Path) -> str:
    """The paper's models at their real size."""
    rows = pd.read_csv(results / "full_size.csv")
    return _table(
        rows[~rows.split].assign(millions=rows.parameters_total / 1e6, removed=1 - rows.kept_linear),
        "model | parameters | linears kept | removed | decompose | peak memory | difference",
        "{model} | {millions:.1f} M | {kept_linear:.1%} | {removed:.1%} | {decompose_s:.0f} s | "
        "{peak_gb:.1f} GB | {error:.1e}",
    )


def scan(results: Path) -> str:
    """Mamba with each selective scan: a training step, and a forward pass."""
    step, forward = (pd.read_csv(results / f"{name}.csv") for name in ("mamba_scan", "mamba_scan_inference"))
    return _table(
        step.merge(forward, on="form", suffixes=("", "_forward")),
        "form (share of the first) | training step | forward pass",
        "{form} | {median_ms:.0f} ms ({of_transformers' loop:.2f}) | "
        "{median_ms_forward:.0f} ms ({of_transformers' loop_forward:.2f})",
    )


def speed(results: Path) -> str:
    """Times as fast as dense, with trained ranks."""
    rows = pd.read_csv(results / "laptop/09_speedup.csv")
    rows = rows[rows.form == "trained ranks"].rename(columns={"speed_up": "up", "flop_limit": "limit"})
    # up_model_decode_1_1: the whole model, one token more, 1 row, 1 thread
    cases = _flat(rows.pivot_table(["up", "limit"], "model", ["part", "phase", "batch", "threads"]))
    return _table(
        cases.loc[rows.model.unique()],
        "model | FLOP limit, blocks | blocks, 1 row | 8 rows | 1 row, 2 threads | 8 rows, 2 threads | "
        "whole model, 1 row (limit) | one token more",
        "{model} | {limit_stack_prefill_1_1:.2f} | {up_stack_prefill_1_1:.2f} | {up_stack_prefill_8_1:.2f} | "
        "{up_stack_prefill_1_2:.2f} | {up_stack_prefill_8_2:.2f} | "
        "{up_model_prefill_1_1:.2f} ({limit_model_prefill_1_1:.2f}) | {up_model_decode_1_1:.2f}",
    )


def tricks(results: Path) -> str:
    """What single tricks gain."""
    rows = pd.read_csv(results / "laptop/09_speedup_tricks.csv")
    gains = rows.pivot_table("gain", "trick", "tokens", sort=False)
    header = ["times as fast", *(f"{tokens} tokens" for tokens in gains)]
    return _markdown(header, gains.map("{:.2f}".format).itertuples())


def memory(results: Path) -> str:
    """Parameters, states and peak of a training step."""
    rows = pd.read_csv(results / "training_memory.csv")
    cells = (rows.parameters / 1e6).map("{:.0f} M: ".format) + rows.states_gb.map("{:.1f} / ".format)
    peaks = rows.peak_gb.map("{:.1f}".format).replace("nan", "not measured")
    return _table(
        rows.assign(cell=cells + peaks).pivot_table("cell", "model", "form", "first").loc[list(FULL_SIZE)],
        "model | dense | soft, at full rank | deployed at half, recovering",
        "{model} | {dense} | {soft} | {deployed}",
    )


def claims(results: Path, who: str) -> str:
    """Every claim, judged on the rows of profile laptop."""
    lines = []
    for claim in load_claims(results / "claims.toml"):
        if claim.who == who:
            judged = judge(claim, results, "laptop")
            claimed = "" if claim.claimed is None else f"{SIGNS[claim.bound]}{claim.claimed:g} {claim.unit}"
            measured = "" if judged.measured is None else f"{judged.measured:.4g} {claim.unit}"
            lines.append([claim.text, claim.setup, claimed, measured, judged.verdict])
    return _markdown(["claim", "setup", "claimed", "measured", "verdict"], lines)


TABLES: dict[str, Callable[..., str]] = {
    table.__name__: table
    for table in (
        rows, headline, static_and_adaptive, ablation, methods, verdicts, trials, fused, defaults, language_defaults,
        int8, full_sizes, scan, speed, tricks, memory, claims,
    )
}  # fmt: skip


def _rows(results: Path, task: str, state: str = "recovered") -> pd.DataFrame:
    """Rows of a task's shown score, recovered (dense ones are) or untuned, without models cut from larger ones."""
    shown = TASKS[task]
    rows = pd.read_csv(results / f"laptop/{shown.book}.csv")
    rows = rows[(rows.recovered == (state == "recovered")) | (rows.method == "dense")]
    rows = rows[~rows.method.str.contains(CUT_FROM) & (rows.task == task.partition(" ")[0])]
    return rows[(rows.metric == shown.metric) & (rows.split == shown.split)]


def _scores(results: Path, columns: Sequence[tuple[str, float]], state: str = "recovered") -> pd.DataFrame:
    """A row for each method, dense first, learned ranks last; a column for each task and budget."""
    table = {}
    for task, keep in columns:
        rows, (scale, digits) = _rows(results, task, state), _unit(task)
        table[task, keep] = {
            # one dense model may serve all seeds
            method: _cell(scale * values, digits, SEEDS if method != "dense" else 0)
            for method, values in rows[(rows.keep == keep) | (rows.method == "dense")].groupby("method").value
        }
    scores = pd.DataFrame(table).fillna("")
    return scores.loc[sorted(scores.index, key=_place)]


def _unit(task: str) -> tuple[int, int]:
    """By what a score is multiplied, and the digits that are shown: in % except perplexity."""
    return (1, 2) if TASKS[task].metric in UNSCALED else (100, 1)


def _place(method: str) -> tuple[bool, int, int, str]:
    """Dense first; the others by how ranks are chosen, learned ones last, then by factors; then any others."""
    factors, _, chosen = method.partition("+")
    places = [
        order.index(part) if part in order else len(order)
        for part, order in ((chosen, (*ALLOCATIONS, "mask", "soft", "cliff-soft")), (factors, FACTORIZATIONS))
    ]
    return method != "dense", places[0], places[1], method


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of several levels under one name: ``dev_f1``."""
    return table.set_axis(["_".join(map(str, column)) for column in table.columns], axis=1)


def _cell(values: pd.Series, digits: int, seeds: int = 0) -> str:
    """Mean and standard deviation, with the number of seeds in brackets if there are fewer."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}{f' ({len(values)})' if len(values) < seeds else ''}"


def _table(rows: pd.DataFrame, header: str, line: str) -> str:
    """A line for each row, filled in with its columns and its index; a cell that lacks a number is empty."""
    rows = rows.reset_index()
    if "keep" in rows:  # papers name one or the other, and 20 % may be either
        rows["removed"] = 1 - rows.keep
    lines = [line.format_map(row).split(" | ") for row in rows.to_dict("records")]
    return _markdown(header.split(" | "), [[re.sub(r".*\bnan\b.*", "", cell) for cell in cells] for cells in lines])


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(map(_unbroken, cells))} |" for cells in (header, *lines))
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def _unbroken(cell: str) -> str:
    """A number stays on one line with its spread or unit."""
    return re.sub(r"(?<=\d) ?(?=%)|(?<=\d) (?=±)|(?<=[±≥≤]) ", "\u00a0", cell)
