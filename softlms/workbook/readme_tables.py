"""README's tables and lines of results, made from the committed rows.

README holds each between ``<!-- table: NAME -->`` and ``<!-- end -->``, which do not show; nothing outside is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from softlms.experiments.full_size import FULL_SIZE
from softlms.experiments.grid import CUT_FROM
from softlms.files import whole_file
from softlms.lowrank.factorization import FACTORIZATIONS
from softlms.methods.chain import parse
from softlms.methods.registry import methods as registered

__all__ = ["TABLES", "check_tables", "two_digits", "write_tables"]

BEGIN = "<!-- table: "
BLOCK = re.compile(BEGIN + r"(?P<name>[\w-]+) -->\s*(?P<text>.*?)\s*<!-- end -->", re.DOTALL)
SEEDS = 3  # of every grid: a cell that has fewer says how many
SPEED_CASES = ((1, 1), (8, 1), (1, 2), (8, 2))  # rows, threads


@dataclass(frozen=True)
class Column:
    """What the columns of one task show, in a table of methods."""

    name: str
    book: str
    task: str
    metric: str
    split: str
    scale: int
    digits: int


CLASSIFIERS = (
    Column("MRPC F1", "05_bert_table", "mrpc", "f1", "test", 100, 1),
    Column("SST-2 accuracy", "05_bert_table", "sst2", "accuracy", "dev", 100, 1),
    Column("RTE accuracy", "05_bert_table", "rte", "accuracy", "dev", 100, 1),
)
LANGUAGE = (
    Column("GPT-2", "06_gpt2_table", "gpt2", "perplexity", "test", 1, 2),
    Column("Llama", "07_tinyllama_table", "llama", "perplexity", "test", 1, 2),
    Column("Mamba", "08_mamba_table", "mamba", "perplexity", "test", 1, 2),
)


def static_and_adaptive(results: Path) -> str:
    """Notebook 04's scores."""
    scores = pd.read_csv(results / "laptop/04_static_vs_adaptive_rank.csv")
    lines = []
    for method in ("dense", "static", "adaptive"):
        rows = scores[scores.method == method]
        cells = [method, _percent(rows.kept_linear.mean()), _percent(rows.kept_total.mean())]
        for split in ("dev", "test"):
            for metric in ("f1", "accuracy"):
                values = 100 * rows[(rows.split == split) & (rows.metric == metric)].value
                cells.append(f"{values.mean():.1f} ± {values.std():.1f}")
        lines.append(cells)
    header = ["method", "linears kept", "total kept", "dev F1", "dev accuracy", "test F1", "test accuracy"]
    return _markdown(header, lines)


def differences(results: Path) -> str:
    """Notebook 04's paired differences."""
    rows = pd.read_csv(results / "laptop/04_static_vs_adaptive_rank_differences.csv")
    lines = [
        [f"{row.difference}, {row.split} F1", f"{row.mean:+.1f}", _interval(row.low95, row.high95, 1)]
        for row in rows[rows.metric == "f1"].itertuples()
    ]
    return _markdown(["paired difference over seeds", "points", "95 % interval"], lines)


def ablation(results: Path) -> str:
    """Notebook 04's single settings."""
    rows = pd.read_csv(results / "laptop/04_static_vs_adaptive_rank_ablation.csv")
    rows = rows[rows.metric == "f1"]
    lines = []
    for setting in rows.setting.unique():
        here = rows[rows.setting == setting]
        cells = [setting, str(here.seed.nunique())]
        for split in ("dev", "test"):
            of_split = 100 * here[here.split == split][["value", "recipe_value"]].mean()
            cells += [f"{of_split.value:.1f}", f"{of_split.value - of_split.recipe_value:+.1f}"]
        lines.append([*cells, f"{here.frozen_at.mean():.0f} of {here.steps.iloc[0]}"])
    header = ["setting", "seeds", "dev F1", "difference", "test F1", "difference", "budget met at step"]
    return _markdown(header, lines)


def methods(results: Path, tasks: Sequence[Column]) -> str:
    """Every method after recovery; a column for each budget that has rows."""
    books = {task.book for task in tasks}
    rows = pd.concat(pd.read_csv(results / f"laptop/{book}.csv") for book in sorted(books))
    rows = rows[rows.recovered & ~rows.method.str.contains(CUT_FROM)]
    compressed = rows[rows.method != "dense"]
    columns = [
        (task, keep)
        for task in tasks
        for keep in sorted(compressed[compressed.task == task.task].keep.unique(), reverse=True)
    ]
    lines = []
    for method in ["dense", *sorted(compressed.method.unique(), key=_place)]:
        cells = [method]
        for task, keep in columns:
            chosen = (
                (rows.method == method) & (rows.task == task.task) & (rows.keep == keep if method != "dense" else True)
            )
            values = rows[chosen & (rows.metric == task.metric) & (rows.split == task.split)].value
            # one dense model may serve all seeds
            cells.append(_cell(task.scale * values, task.digits, SEEDS if method != "dense" else 0))
        lines.append(cells)
    return _markdown(["method", *(f"{task.name}, {100 * keep:.0f} %" for task, keep in columns)], lines)


def verdicts(results: Path, tasks: Sequence[Column], first: str, difference: str) -> str:
    """SoftLMs against its rivals, by task and falling budget; the best other method first."""
    digits = {task.task: task.digits for task in tasks}
    books = dict.fromkeys(task.book for task in tasks)
    rows = pd.concat(pd.read_csv(results / f"laptop/{book}_verdicts.csv") for book in books)
    rows = rows.sort_values(["task", "keep"], ascending=[True, False], kind="stable")
    lines = []
    for row in rows.itertuples():
        gain, interval = f"{row.difference:+.{digits[row.task]}f}", _interval(row.low95, row.high95, digits[row.task])
        lines.append([row.task, f"{100 * row.keep:.0f} %", row.soft, row.rival, gain, interval])
    return _markdown([first, "kept", "SoftLMs", "rival", difference, "95 % interval"], lines)


def trials(results: Path) -> str:
    """How many trials the settings of the language models took."""
    rows = pd.read_csv(results / "laptop/language_trials.csv")
    counts = {
        family: [int(of_family.method.str.endswith(kind).sum()) for kind in ("+soft", "+uniform", "+mask")]
        for family, of_family in rows.groupby("family")
    }
    mamba, llama, gpt2 = counts["mamba"], counts["llama"], counts["gpt2"]
    others = "; ".join(f"at {name} {', '.join(map(str, n))}" for name, n in (("Llama", llama), ("GPT-2", gpt2)))
    return f"{mamba[0]}, uniform ranks {mamba[1]}, masks {mamba[2]}; {others}"


def full_sizes(results: Path) -> str:
    """The paper's models at their real size."""
    rows = pd.read_csv(results / "full_size.csv")
    lines = []
    for row in rows[~rows.split].itertuples():
        size = [f"{row.parameters_total / 1e6:.1f} M", _percent(row.kept_linear)]
        lines.append([row.model, *size, f"{row.decompose_s:.0f} s", f"{row.peak_gb:.1f} GB", f"{row.error:.1e}"])
    return _markdown(["model", "parameters", "linears kept", "decompose", "peak memory", "difference"], lines)


def scan(results: Path) -> str:
    """A training step of Mamba with each selective scan."""
    return _scans(results / "mamba_scan.csv")


def scan_inference(results: Path) -> str:
    """A forward pass of Mamba with each selective scan."""
    return _scans(results / "mamba_scan_inference.csv")


def two_digits(value: float) -> str:
    """At least two significant digits and never an exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _scans(path: Path) -> str:
    ms = pd.read_csv(path).set_index("form").median_ms
    forms = ("transformers' loop", "mambapy", "softlms")
    seconds = ", ".join(f"{form} {two_digits(ms[form] / 1e3)} s" for form in forms)
    return f"{seconds}, {ms[forms[0]] / ms[forms[-1]]:.0f} times faster than the loop"


def speed(results: Path) -> str:
    """Times as fast as dense, with trained ranks."""
    rows = pd.read_csv(results / "laptop/09_speedup.csv")
    rows = rows[rows.form == "trained ranks"].set_index(["model", "part", "phase", "batch", "threads"])
    lines = []
    for model in rows.index.unique("model"):
        blocks, whole = (rows.loc[(model, part, "prefill", 1, 1)] for part in ("stack", "model"))
        cells = [model, f"{blocks.flop_limit:.2f}"]
        cells += [f"{rows.loc[(model, 'stack', 'prefill', *case)].speed_up:.2f}" for case in SPEED_CASES]
        cells += [f"{whole.speed_up:.2f} ({whole.flop_limit:.2f})"]
        lines.append([*cells, f"{rows.loc[(model, 'model', 'decode', 1, 1)].speed_up:.2f}"])
    header = ["model", "FLOP limit, blocks", "blocks, 1 row", "8 rows", "1 row, 2 threads", "8 rows, 2 threads"]
    return _markdown([*header, "whole model, 1 row (limit)", "one token more"], lines)


def memory(results: Path) -> str:
    """Parameters, states and peak of a training step."""
    rows = pd.read_csv(results / "training_memory.csv").set_index(["model", "form"])
    lines = []
    for model in FULL_SIZE:
        cells = [model]
        for form in ("dense", "soft", "deployed"):
            row = rows.loc[(model, form)]
            peak = "not measured" if pd.isna(row.peak_gb) else f"{row.peak_gb:.1f}"
            cells.append(f"{row.parameters / 1e6:.0f} M: {row.states_gb:.1f} / {peak}")
        lines.append(cells)
    return _markdown(["model", "dense", "soft, at full rank", "deployed at half, recovering"], lines)


def speed_split(results: Path) -> str:
    """Why blocks are not as fast as their FLOPs allow: linear layers alone, and the rest."""
    rows = pd.read_csv(results / "laptop/09_speedup_split.csv").set_index(["model", "form"])
    said = []
    for model in rows.index.unique("model"):
        dense, thin = (rows.loc[(model, form)] for form in ("dense", "trained ranks"))
        said.append(
            f"{model}'s linear layers are {thin.linears_speed_up:.2f} times as fast where FLOPs allow "
            f"{thin.linears_flop_limit:.2f} ({thin.gflops_per_s:.0f} GFLOPs a second, dense {dense.gflops_per_s:.0f}), "
            f"and the rest, {dense.rest_ms:.0f} ms of {dense.blocks_ms:.0f} before, is {thin.rest_ms:.0f} ms of "
            f"{thin.blocks_ms:.0f}"
        )
    return "; ".join(said)


TABLES: dict[str, Callable[[Path], str]] = {
    "static-and-adaptive": static_and_adaptive,
    "differences": differences,
    "ablation": ablation,
    "methods": lambda results: methods(results, CLASSIFIERS),
    "verdicts": lambda results: verdicts(results, CLASSIFIERS, "task", "difference"),
    "language-trials": trials,
    "language-methods": lambda results: methods(results, LANGUAGE),
    "language-verdicts": lambda results: verdicts(results, LANGUAGE, "model", "lower by"),
    "full-sizes": full_sizes,
    "scan": scan,
    "scan-inference": scan_inference,
    "speed": speed,
    "speed-split": speed_split,
    "memory": memory,
}


def check_tables(text: str, results: Path) -> list[str]:
    """Where a text's blocks are not what the rows say; empty where all are.

    Parameters
    ----------
    text : str
        README's.
    results : Path
        The folder ``results``.

    Raises
    ------
    ValueError, FileNotFoundError
        Markers that are no pair, a name that is no table, or one that is missing or there twice; rows are missing.
    """
    wrong = []
    for block in _blocks(text):
        written, said = block["text"].splitlines(), _render(block["name"], results).splitlines()
        if written != said:
            # the first line that differs, or that one of them has more
            i = next((i for i, pair in enumerate(zip(written, said, strict=False)) if len(set(pair)) > 1), None)
            i = min(len(written), len(said)) if i is None else i
            here, there = ("".join(lines[i : i + 1]) or "nothing" for lines in (written, said))
            wrong.append(f"table {block['name']}: README has {here!r}, the rows say {there!r}")
    return wrong


def write_tables(path: Path, results: Path) -> None:
    """Write a file's blocks anew, and nothing else of it; parameters and errors as `check_tables`."""
    text = path.read_text("utf-8")
    for block in reversed(_blocks(text)):
        text = text[: block.start("text")] + _render(block["name"], results) + text[block.end("text") :]
    if text != path.read_text("utf-8"):
        with whole_file(path) as partial:
            partial.write_text(text, "utf-8")


def _blocks(text: str) -> list[re.Match[str]]:
    blocks = list(BLOCK.finditer(text))
    if len(blocks) != text.count(BEGIN) or any(BEGIN in block["text"] for block in blocks):
        raise ValueError(f"README.md: a block that {BEGIN!r} begins has no '<!-- end -->'.")
    names = [block["name"] for block in blocks]
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"README.md has the tables {', '.join(names)}; it should have {', '.join(TABLES)}, each once.")
    return blocks


def _render(name: str, results: Path) -> str:
    try:
        return TABLES[name](results)
    except KeyError as missing:
        raise ValueError(f"README's table {name} needs {missing}, which its rows in {results} lack.") from missing


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def _cell(values: pd.Series, digits: int, seeds: int) -> str:
    """Mean and standard deviation, and the number of seeds in brackets where there are fewer; empty without values."""
    if values.empty:
        return ""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}{f' ({len(values)})' if len(values) < seeds else ''}"


def _place(method: str) -> tuple[int, int]:
    """Methods by how ranks are chosen, learned ones last, then by factors."""
    (link,) = parse(method)
    return list(registered()).index(link.method.name), FACTORIZATIONS.index(link.said["factors"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(low: float, high: float, digits: int) -> str:
    return "" if pd.isna(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
