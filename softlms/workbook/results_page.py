"""``docs/results.md`` and README's headline, made from the committed rows.

The whole page is generated. README holds each of its tables between ``<!-- table: NAME -->`` and ``<!-- end -->``,
which do not show; nothing outside is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pandas as pd

from softlms.experiments.full_size import FULL_SIZE
from softlms.experiments.grid import CUT_FROM
from softlms.files import whole_file
from softlms.lowrank.allocation import ALLOCATIONS
from softlms.lowrank.factorization import FACTORIZATIONS
from softlms.workbook.claims import Judged, judge, load_claims

__all__ = ["PAGE", "check_results", "write_results"]

PAGE = "docs/results.md"
BEGIN = "<!-- table: "
BLOCK = re.compile(BEGIN + r"(?P<name>[\w-]+) -->\s*(?P<text>.*?)\s*<!-- end -->", re.DOTALL)
SEEDS = 3  # of every grid; a cell with fewer shows its number
SPEED_CASES = ((1, 1), (8, 1), (1, 2), (8, 2))  # rows, threads
FORMS = ("dense", "soft", "deployed")


@dataclass(frozen=True)
class Task:
    """Where a task's scores are stored, and how they are shown."""

    name: str
    book: str
    key: str
    metric: str
    split: str
    scale: int = 1
    digits: int = 2


MRPC = Task("MRPC F1", "05_bert_table", "mrpc", "f1", "test", 100, 1)
SST2 = Task("SST-2 accuracy", "05_bert_table", "sst2", "accuracy", "dev", 100, 1)
RTE = Task("RTE accuracy", "05_bert_table", "rte", "accuracy", "dev", 100, 1)
GPT2 = Task("GPT-2 perplexity", "06_gpt2_table", "gpt2", "perplexity", "test")
LLAMA = Task("Llama perplexity", "07_tinyllama_table", "llama", "perplexity", "test")
MAMBA = Task("Mamba perplexity", "08_mamba_table", "mamba", "perplexity", "test")
HEADLINE = {
    "dense": "dense",
    "svd+uniform": "SVD, the same share everywhere",
    "whitened+uniform": "whitened SVD, the same share everywhere",
    "whitened+mask": "whitened SVD, learned masks",
    "whitened+soft": "**whitened SVD, learned ranks**",
}


def headline(results: Path) -> str:
    """Half of the linears' weights kept: what methods score on five tasks."""
    header, *lines = _scores(results, [(task, 0.5) for task in (MRPC, SST2, GPT2, LLAMA, MAMBA)])
    return _markdown(header, [[HEADLINE[line[0]], *line[1:]] for line in lines if line[0] in HEADLINE])


def static_and_adaptive(results: Path) -> str:
    """Notebook 04's scores."""
    scores = pd.read_csv(results / "laptop/04_static_vs_adaptive_rank.csv")
    lines = []
    for method in ("dense", "static", "adaptive"):
        rows = scores[scores.method == method]
        cells = [method, _percent(rows.kept_linear.mean()), _percent(rows.kept_total.mean())]
        for split in ("dev", "test"):
            for metric in ("f1", "accuracy"):
                cells.append(_cell(100 * rows[(rows.split == split) & (rows.metric == metric)].value, 1))
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


def methods(results: Path, task: Task) -> str:
    """Every method after recovery, at every budget that has rows."""
    rows = pd.read_csv(results / f"laptop/{task.book}.csv")
    rows = rows[rows.recovered & (rows.task == task.key) & ~rows.method.str.contains(f"dense|{CUT_FROM}")]
    budgets = sorted(rows.keep.unique(), reverse=True)
    _, *lines = _scores(results, [(task, keep) for keep in budgets])
    return _markdown(["method", *(f"{100 * keep:.0f} % kept" for keep in budgets)], lines)


def verdicts(results: Path, tasks: Sequence[Task]) -> str:
    """SoftLMs against its rivals, by task and falling budget; the best other method first."""
    digits = {task.key: task.digits for task in tasks}
    books = dict.fromkeys(task.book for task in tasks)
    rows = pd.concat(pd.read_csv(results / f"laptop/{book}_verdicts.csv") for book in books)
    rows = rows.sort_values(["task", "keep"], ascending=[True, False], kind="stable")
    lines = []
    for row in rows.itertuples():
        gain, interval = f"{row.difference:+.{digits[row.task]}f}", _interval(row.low95, row.high95, digits[row.task])
        lines.append([row.task, f"{100 * row.keep:.0f} %", row.soft, row.rival, gain, interval])
    return _markdown(["task", "kept", "SoftLMs", "rival", "better by", "95 % interval"], lines)


def trials(results: Path) -> str:
    """How many trials the settings of the language models took."""
    rows = pd.read_csv(results / "laptop/language_trials.csv")
    kinds = rows.method.str.partition("+")[2]
    counts = pd.crosstab(rows.family, kinds)[["soft", "uniform", "mask"]]
    lines = [[family, *map(str, row)] for family, row in zip(counts.index, counts.to_numpy(), strict=True)]
    return _markdown(["model", "soft thresholds", "uniform ranks", "masks"], lines)


def fused(results: Path) -> str:
    """GPT-2's fused projection, factored whole or taken apart."""
    rows = pd.read_csv(results / "laptop/06_gpt2_table_fused.csv")
    rows = rows[rows.recovered & (rows.split == "test")]
    lines = [[*key, _cell(of_key.value, 2, SEEDS)] for key, of_key in rows.groupby(["method", "c_attn"])]
    return _markdown(["method", "`c_attn`", "perplexity"], lines)


def defaults(results: Path) -> str:
    """The library's defaults on MRPC, less notebook 05's settings, which were tuned by hand."""
    ours = pd.read_csv(results / "defaults.csv").rename(columns={"factors": "factorize"})
    rows = pd.read_csv(results / "laptop/05_bert_table.csv")
    rows = rows[(rows.task == "mrpc") & (rows.allocate == "soft") & (rows.method == rows.factorize + "+soft")]
    tuned = rows[rows.recovered & (rows.split == "test") & (rows.metric == "f1")]
    both = ours.merge(tuned, on=["factorize", "keep", "seed"])
    lines = []
    for (factors, keep), of_key in both.groupby(["factorize", "keep"], sort=False):
        lost = (of_key.value - of_key.test_f1).mean()
        scores = (_cell(100 * values, 1, SEEDS) for values in (of_key.test_f1, of_key.value))
        lines.append([factors, f"{100 * keep:.0f} %", *scores, f"{100 * lost:.1f}"])
    return _markdown(["factors", "kept", "defaults", "tuned by hand", "points lost"], lines)


def language_defaults(results: Path) -> str:
    """The library's defaults on the small language models of profile quick."""
    rows = pd.read_csv(results / "defaults_language.csv")
    table = rows.pivot_table("test_perplexity", ["model", "method", "keep"], "settings").reset_index()
    lines = [
        [row.model, row.method, f"{100 * row.keep:.0f} %", f"{row.defaults:.2f}", f"{row.tuned:.2f}"]
        for row in table.sort_values(["model", "keep"], ascending=[True, False], kind="stable").itertuples()
    ]
    return _markdown(["model", "method", "kept", "defaults", "tuned for profile laptop"], lines)


def int8(results: Path) -> str:
    """Ways to round weights to 8 bits for onnxruntime."""
    rows = pd.read_csv(results / "export_int8.csv")
    lines = []
    for row in rows.itertuples():
        cells = [row.hardware.partition(",")[0], row.weights, row.basis, f"{100 * row.f1:.1f}"]
        lines.append([*cells, _percent(row.agreement), f"{row.median_ms:.0f}"])
    return _markdown(["processor", "weights", "basis", "test F1", "torch's answer", "ms a row"], lines)


def full_sizes(results: Path) -> str:
    """The paper's models at their real size."""
    rows = pd.read_csv(results / "full_size.csv")
    lines = []
    for row in rows[~rows.split].itertuples():
        size = [f"{row.parameters_total / 1e6:.1f} M", _percent(row.kept_linear)]
        lines.append([row.model, *size, f"{row.decompose_s:.0f} s", f"{row.peak_gb:.1f} GB", f"{row.error:.1e}"])
    return _markdown(["model", "parameters", "linears kept", "decompose", "peak memory", "difference"], lines)


def training_step(results: Path) -> str:
    """What a training step costs."""
    return _times(results, ["training_step.csv"], "of_dense", ["a step"])


def scan(results: Path) -> str:
    """Mamba with each selective scan: a training step, and a forward pass."""
    files = ["mamba_scan.csv", "mamba_scan_inference.csv"]
    return _times(results, files, "of_transformers' loop", ["training step", "forward pass"])


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


def speed_split(results: Path) -> str:
    """Why blocks are not as fast as their FLOPs allow: linear layers alone, and the rest."""
    rows = pd.read_csv(results / "laptop/09_speedup_split.csv")
    lines = []
    for row in rows[rows.form != "uniform ranks"].itertuples():
        times = [f"{ms:.0f}" for ms in (row.blocks_ms, row.linears_ms, row.rest_ms)]
        limit = f"{row.linears_speed_up:.2f} ({row.linears_flop_limit:.2f})"
        lines.append([row.model, row.form, *times, limit, f"{row.gflops_per_s:.0f}"])
    header = ["model", "form", "blocks, ms", "linears, ms", "the rest, ms"]
    return _markdown([*header, "linears' speed-up (limit)", "GFLOPs a second"], lines)


def onnx(results: Path) -> str:
    """Speed under onnxruntime."""
    rows = pd.read_csv(results / "laptop/09_speedup_onnx.csv")
    lines = [
        [row.model, row.form, f"{row.median_ms:.0f}", f"{row.speed_up:.2f}", f"{row.file_mb:.0f}"]
        for row in rows.itertuples()
    ]
    return _markdown(["model", "form", "ms", "times as fast", "file, MB"], lines)


def tricks(results: Path) -> str:
    """What single tricks gain."""
    rows = pd.read_csv(results / "laptop/09_speedup_tricks.csv")
    gains = rows.pivot_table("gain", "trick", "tokens", sort=False)
    lines = [[trick, *map("{:.2f}".format, row)] for trick, row in zip(gains.index, gains.to_numpy(), strict=True)]
    return _markdown(["times as fast", *(f"{tokens} tokens" for tokens in gains)], lines)


def memory(results: Path) -> str:
    """Parameters, states and peak of a training step."""
    rows = pd.read_csv(results / "training_memory.csv").set_index(["model", "form"])
    lines = []
    for model in FULL_SIZE:
        cells = [model]
        for form in FORMS:
            row = rows.loc[(model, form)]
            peak = "not measured" if pd.isna(row.peak_gb) else f"{row.peak_gb:.1f}"
            cells.append(f"{row.parameters / 1e6:.0f} M: {row.states_gb:.1f} / {peak}")
        lines.append(cells)
    return _markdown(["model", "dense", "soft, at full rank", "deployed at half, recovering"], lines)


def claims(results: Path, who: str) -> str:
    """Every claim, judged on the rows of profile laptop."""
    judged = [judge(claim, results, "laptop") for claim in load_claims(results / "claims.toml") if claim.who == who]
    return _markdown(["claim", "setup", "claimed", "measured", "verdict"], [_claim_line(one) for one in judged])


TABLES: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "static": static_and_adaptive,
    "differences": differences,
    "ablation": ablation,
    "mrpc": lambda results: methods(results, MRPC),
    "sst2": lambda results: methods(results, SST2),
    "rte": lambda results: methods(results, RTE),
    "verdicts": lambda results: verdicts(results, [MRPC, SST2, RTE]),
    "gpt2": lambda results: methods(results, GPT2),
    "llama": lambda results: methods(results, LLAMA),
    "mamba": lambda results: methods(results, MAMBA),
    "language_verdicts": lambda results: verdicts(results, [GPT2, LLAMA, MAMBA]),
    "trials": trials,
    "fused": fused,
    "defaults": defaults,
    "language_defaults": language_defaults,
    "full_sizes": full_sizes,
    "speed": speed,
    "speed_split": speed_split,
    "onnx": onnx,
    "tricks": tricks,
    "training_step": training_step,
    "scan": scan,
    "memory": memory,
    "int8": int8,
    "of_paper": lambda results: claims(results, "paper"),
    "ours": lambda results: claims(results, "softlms"),
}
IN_README = ("headline",)

TEXT = """# Results

Every number in a table here is read from the committed rows in `results/`. `softlms verify --write` generates this
page, and `softlms verify` fails where the page and the rows differ. Scores are means ± standard deviations over seeds.
`softlms figures NOTEBOOK --profile laptop` makes the rows, and each notebook prints its recipe.

The models are small: an already distilled encoder, on small data sets, and language models of 4 to 6 million
parameters trained here. Nothing on this page says how larger models behave.

A method is named by how its factors are made and how its ranks are chosen: `whitened+soft` has whitened factors and
soft thresholds.

## The headline

Half of the linear layers' weights are kept. F1 and accuracy in %: higher is better. Perplexity: lower is better.

{headline}

## Static and adaptive ranks

MRPC, MiniLM, half of the linear layers' weights, 5 seeds, in %. Static and adaptive start from the same fine-tuned
model and train for the same number of steps with the same distillation. Settings were chosen on dev at seed 0; test
scores were printed beside them, so test is not a blind measure. Rows: `results/laptop/04_*.csv`.

{static}

{differences}

The effect of single settings of the adaptive model: F1 with the setting changed, and the difference from the recipe at
the same seeds. There are few seeds: read differences below about two points as noise.

{ablation}

## Every method, three tasks

MiniLM after recovery, on test (MRPC) or dev (the others: GLUE does not publish their test labels), 3 seeds, in %. At
each seed all methods start from the same dense model, take the same number of steps with the same distillation, and
fill the same share of the linear layers' weights. The learning rate and the thresholds' settings were chosen on
MRPC's dev split and on training rows of SST-2 that no run trains on (`results/laptop/05_bert_table_trials.csv`).
Rows, ranks, untuned scores and speed: `results/laptop/05_*`.

We recommend `whitened+soft`. It has the highest mean at every budget of MRPC, within the spread of several rivals, and
at 75 % of SST-2. At SST-2's smaller budgets `whitened+mask` is ahead, with intervals that include zero. Whitening is
the larger gain; learned ranks, by masks or thresholds, matter where much is cut. With the successor's weight of the
compression loss, whitened factors learn no ranks at all (notebook 05 explains why). A soft model can be cut to any
smaller size without training.

### MRPC, F1

{mrpc}

### SST-2, accuracy

{sst2}

### RTE, accuracy

Near chance for this encoder, the dense model included: differences say little.

{rte}

### Against the rivals

The better SoftLMs row against the best other row and, if that is a different one, against the best with uniform ranks.
All are chosen on dev among those run at all seeds, and paired over seeds.

{verdicts}

## Language models

Small models of the real transformers classes (hidden 256, 6 layers, vocabulary 4096), trained from scratch on
docstrings of installed libraries. Perplexity on held-out text, lower is better, over 3 seeds of calibration and of
training after the cut; one dense model each. At each seed all methods start from it, take the same steps on the same
text, and fill the same share of the linear layers' weights. Rows, ranks, samples and speed: `results/laptop/06_*` to
`08_*`.

At one half `whitened+soft` has lower perplexity than uniform SVD, plain or whitened, on all three, with intervals
clear of zero. Against learned masks it leads on Llama and, with intervals that include zero, on Mamba; on GPT-2,
which loses little, the two are level. At 75 % of Llama the masks are ahead. Mamba's thresholds need a larger gamma
than the others': with 0.03 they did not meet the budget on their own in any trial.

### GPT-2

{gpt2}

### Llama

{llama}

### Mamba

{mamba}

### Against the rivals

{language_verdicts}

Settings were chosen on dev at seed 0 and 50 %, with unequal numbers of trials
(`results/laptop/language_trials.csv`; Mamba's on an earlier training of its dense model):

{trials}

GPT-2's fused projection `c_attn` factored as one matrix, or split into queries, keys and values (50 % kept):

{fused}

## The defaults

With the library's defaults only `keep` has to be chosen. On MRPC, test F1 in %, against notebook 05's settings, which
were tuned by hand (`results/defaults.csv`):

{defaults}

On the small language models of profile quick, test perplexity at one seed, against the settings tuned for
profile laptop (`results/defaults_language.csv`):

{language_defaults}

## The full sizes, with random weights

`softlms full-size MODEL` builds a model from its configuration with random weights, decomposes every linear layer, cuts
to half of the *total* parameters and deploys. It compares the outputs with those of the recomposed dense model (norm of
the difference over norm). fp32, 2 threads (`results/full_size.csv`).

{full_sizes}

## Speed

Half of the *total* parameters removed, the paper's models at their real size (random weights: time depends on shapes
alone), fp32, 128 tokens per row. Speed-up over dense, from the median of forward passes that take turns, with one
thread unless stated. Ranks are those learned in the laptop runs, stretched to the depth of the real model, in multiples
of 16. Layers that two products would make slower at one token stay dense, and count as dense. The limit is the ratio of
FLOPs; it can be slightly exceeded, because there are fewer weights to read. Uniform ranks, quartiles and rooflines:
`results/laptop/09_speedup.csv`.

Mamba runs on the compiled scan in both forms, dense and thin. GPT-2's GELU runs in one pass in both forms, and freed
memory is kept for the next call in both (`softlms.keep_memory`).

{speed}

Why blocks stay below the limit: linear layers timed alone, and the rest (1 row, one thread;
`results/laptop/09_speedup_split.csv`).

{speed_split}

Under onnxruntime (1 row, one thread; `results/laptop/09_speedup_onnx.csv`):

{onnx}

Single tricks: the speed-up from each (`results/laptop/09_speedup_tricks.csv`):

{tricks}

## Training

A training step of MiniLM (16 x 64 tokens, fp32, 1 thread; `softlms benchmark`, `results/training_step.csv`):

{training_step}

Mamba on a CPU with each selective scan (hidden 256, 6 layers, 16 x 128 tokens, fp32, 2 threads; `softlms
benchmark-scan`, `results/mamba_scan.csv` and `results/mamba_scan_inference.csv`):

{scan}

Memory, fp32 with AdamW, 1 row of 128 tokens. Trained parameters: GB of their weights, gradients and moments (16 bytes
each) / GB of the whole process at its peak (`softlms training-memory`, `results/training_memory.csv`). The soft form
is larger than the dense model: a square matrix becomes two of its size.

{memory}

## Weights of 8 bits

MiniLM compressed to 35 %, on MRPC's test split, in float32 and with several ways of rounding for onnxruntime: one model
with plain factors on a processor with VNNI instructions (Intel), one with whitened factors on a processor without
(AMD). `export_onnx(int8=True)` is the library's way (`results/export_int8.csv`).

{int8}

## Claims

Each claim is in `results/claims.toml` with the rows that measure it, and is judged on profile laptop. REPRODUCED: at or
better than the claimed value; a claim without a bound could be measured. WITHIN TOLERANCE: short of it by no more than
the claim's tolerance. NOT COMPARABLE: the claim is about another model, data, profile or machine; our number neither
supports nor contradicts it.

### The paper's

{of_paper}

### Our own

{ours}
"""


def check_results(root: Path) -> list[str]:
    """Where `PAGE` or a table of README differs from the rows, or rows are missing; empty if all is well.

    Raises
    ------
    ValueError
        README's markers do not match, or its tables are not the expected ones, each once.
    """
    try:
        expected = _expected(root)
    except FileNotFoundError as error:
        return [f"{PAGE}: {error.filename} is missing"]
    wrong = []
    for path, due in expected.items():
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        pairs = zip_longest(lines, due.splitlines(), fillvalue="nothing")
        differs = next(((there, said) for there, said in pairs if there != said), None)
        if differs:
            wrong.append(f"{path.relative_to(root)} has {differs[0]!r}, the rows say {differs[1]!r}")
    return wrong


def write_results(root: Path) -> None:
    """Rewrite `PAGE` and README's tables, and nothing else; raises ``FileNotFoundError`` where rows are missing."""
    for path, due in _expected(root).items():
        if not path.is_file() or path.read_text("utf-8") != due:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as partial:
                partial.write_text(due, "utf-8")


def _expected(root: Path) -> dict[Path, str]:
    """What each file should contain."""
    results, readme = root / "results", root / "README.md"
    text = readme.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    if len(blocks) != text.count(BEGIN) or any(BEGIN in block["text"] for block in blocks):
        raise ValueError(f"README.md: a block that {BEGIN!r} begins has no '<!-- end -->'.")
    if tuple(block["name"] for block in blocks) != IN_README:
        raise ValueError(f"README.md should have each of these tables once: {', '.join(IN_README)}.")
    for block in reversed(blocks):
        text = text[: block.start("text")] + _render(block["name"], results) + text[block.end("text") :]
    page = TEXT.format(**{name: _render(name, results) for name in TABLES})
    return {root / PAGE: page, readme: text}


def _render(name: str, results: Path) -> str:
    try:
        return TABLES[name](results)
    except KeyError as missing:
        raise ValueError(f"Table {name} needs {missing}, which its rows in {results} lack.") from missing


def _scores(results: Path, columns: Sequence[tuple[Task, float]]) -> list[list[str]]:
    """A row for each method after recovery, dense first, learned ranks last; a column for each task and budget."""
    tables = {task.book: pd.read_csv(results / f"laptop/{task.book}.csv") for task, _ in columns}
    rows = pd.concat(tables.values())
    rows = rows[rows.recovered & ~rows.method.str.contains(CUT_FROM)]
    shown = rows[rows.task.isin([task.key for task, _ in columns])].method.unique()
    lines = [["method", *(task.name for task, _ in columns)]]
    for method in ["dense", *sorted(set(shown) - {"dense"}, key=_place)]:
        of_method, cells = rows[rows.method == method], []
        for task, keep in columns:
            chosen = (of_method.task == task.key) & (of_method.metric == task.metric) & (of_method.split == task.split)
            values = of_method[chosen & (of_method.keep.eq(keep) | (method == "dense"))].value
            # one dense model may serve all seeds
            cells.append(_cell(task.scale * values, task.digits, SEEDS if method != "dense" else 0))
        lines.append([method, *cells])
    return lines


def _times(results: Path, files: Sequence[str], relative: str, headers: Sequence[str]) -> str:
    """A row for each form, a column for each file: the median, and how it compares."""
    tables = [pd.read_csv(results / file).set_index("form") for file in files]
    lines = [
        [form, *(f"{table.median_ms[form]:.0f} ms ({table[relative][form]:.2f})" for table in tables)]
        for form in tables[0].index
    ]
    return _markdown(["form (share of the first)", *headers], lines)


def _claim_line(one: Judged) -> list[str]:
    claim = one.claim
    sign = {"at_least": "≥ ", "at_most": "≤ ", "equals": "", "": ""}[claim.bound]
    claimed = "" if claim.claimed is None else f"{sign}{claim.claimed:g} {claim.unit}"
    measured = "" if one.measured is None else f"{one.measured:.4g} {claim.unit}"
    return [claim.text, claim.setup, claimed, measured, one.verdict]


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(map(_unbroken, cells))} |" for cells in (header, *lines))
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def _unbroken(cell: str) -> str:
    """A number stays on one line with its spread or unit."""
    return re.sub(r"(?<=\d) (?=[±%])|(?<=[±≥≤]) ", "\u00a0", cell)


def _cell(values: pd.Series, digits: int, seeds: int = 0) -> str:
    """Mean and standard deviation, with the number of seeds in brackets if there are fewer; empty without values."""
    if values.empty:
        return ""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}{f' ({len(values)})' if len(values) < seeds else ''}"


def _place(method: str) -> tuple[int, int, str]:
    """Methods by how ranks are chosen, learned ones last, then by factors; then those that are no such pair."""
    factors, _, chosen = method.partition("+")
    places = [
        order.index(part) if part in order else len(order)
        for part, order in ((chosen, (*ALLOCATIONS, "mask", "soft")), (factors, FACTORIZATIONS))
    ]
    return places[0], places[1], method


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(low: float, high: float, digits: int) -> str:
    return "" if pd.isna(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
