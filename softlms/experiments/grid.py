"""The table: every method at every budget on every task, on the same rows, steps and seeds.

The grid is done cell by cell (`run_grid`); a cell is one method at one seed, stored like any other run. So a killed
grid continues with the first missing cell. Cells are ordered so that a grid stopped early is still a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from softlms.architectures import find_targets
from softlms.data.tasks import TASKS
from softlms.experiments.bench import Bench
from softlms.experiments.jobs import Job, available_processes, run_jobs, tell_stored
from softlms.experiments.recipe import Recipe
from softlms.experiments.store import Run
from softlms.experiments.timing import summarize_times
from softlms.kernels.selective_scan import fast_scan
from softlms.measure import interleaved, random_rows
from softlms.methods.chain import parse
from softlms.surgery import shrink
from softlms.utils.machine import fast_bf16, hardware, use_threads

__all__ = [
    "CLIFF",
    "CUT_FROM",
    "GRIDS",
    "PARTS",
    "UNSCALED",
    "Grid",
    "Pass",
    "Setting",
    "costs",
    "grid_rows",
    "leading_metric",
    "middle_budget",
    "rank_rows",
    "run_grid",
    "summarize",
]

# metrics that are not fractions of 1, and better when lower
UNSCALED = ("perplexity",)
CUT_FROM = " cut from "  # names the rows of a soft model that was cut further

RANK_COLUMNS = ("task", "method", "keep", "seed", "layer", "block", "symbol", "m", "n", "rank")

BASELINES = ("svd+uniform", "whitened+uniform")
SOFT = ("svd+soft", "whitened+soft")
OTHERS = (
    "fwsvd+uniform", "asvd+uniform", "whitened+energy", "whitened+greedy", "whitened+sensitivity", "svd+mask",
    "whitened+mask",
)  # fmt: skip
CLIFF = ("kfac+cliff", "kfac+cliff-soft")
# methods of which one is recommended; tables and figures of a part of the grid are named after it
PARTS = {"recommended": ("whitened+uniform", "whitened+mask", "whitened+soft", *CLIFF)}
# for the others, the untuned state is measured before recovery
UNTUNED = tuple(f"{f}+{a}" for f in ("svd", "fwsvd", "asvd") for a in ("energy", "greedy"))


@dataclass(frozen=True)
class Setting:
    """How a task is run.

    Attributes
    ----------
    changes : mapping
        To the grid's recipe, for all methods.
    methods : mapping
        Method to changes for it alone; applied last.
    train_rows, max_length
        See `softlms.experiments.bench.Bench`.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train_rows: int | None = None
    max_length: int = 128


@dataclass(frozen=True)
class Pass:
    """Methods at budgets, on all of the grid's tasks; untuned if not `recover`; at all of the grid's seeds or these.

    `changes` are to the grid's recipe, applied last.
    """

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    recover: bool = True
    seeds: tuple[int, ...] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """All cells of a profile's table, the most informative first.

    Attributes
    ----------
    recipe : Recipe
        What all cells share.
    changes : mapping
        Settings of single methods instead: a threshold's scale depends on the scale of sigma.
    tasks : mapping
        Setting of each task.
    seeds : tuple of int
    passes : tuple of Pass
        Done one after the other.
    """

    recipe: Recipe
    tasks: Mapping[str, Setting]
    seeds: tuple[int, ...]
    passes: tuple[Pass, ...]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def only(self, *tasks: str) -> Grid:
        """The grid restricted to some tasks; tasks that are not in it get default settings."""
        return replace(self, tasks={task: self.tasks.get(task, Setting()) for task in tasks})

    def part(self, name: str) -> Grid:
        """The grid restricted to the methods of one of `PARTS`; ValueError for an unknown one."""
        if name not in PARTS:
            raise ValueError(f"Unknown part {name!r} of the grid; known: {', '.join(PARTS)}.")
        passes = [replace(one, methods=tuple(m for m in one.methods if m in PARTS[name])) for one in self.passes]
        return replace(self, passes=tuple(one for one in passes if one.methods and one.recover))

    def units(self, benches: Mapping[str, Bench]) -> Iterator[list[Job]]:
        """Jobs that share a dense model, budget and seed, in the order of the passes; dense comes first.

        Parameters
        ----------
        benches : mapping
            The bench of each task.
        """
        for one in self.passes:
            for keep in one.keeps:
                for task in self.tasks:
                    for seed in one.seeds or self.seeds:
                        setting = self.tasks[task]
                        recipe = self.recipe.changed(**setting.changes, keep=keep)
                        recipe = recipe if one.recover else recipe.changed(epochs=0, distillation=0.0)
                        yield [
                            Job(
                                benches[task], method, recipe.changed(**self._own(method, setting), **one.changes), seed
                            )
                            for method in ("dense", *one.methods)
                        ]

    def describe(self) -> str:
        """The recipe that all cells share, and the settings of tasks and methods that differ: one line each."""
        lines = [str(self.recipe)]
        for task, setting in self.tasks.items():
            rows = {"train_rows": setting.train_rows} if setting.train_rows else {}
            lines += _say(task, {**setting.changes, **rows})
            lines += [line for method, own in setting.methods.items() for line in _say(f"{task}, {method}", own)]
        return "\n".join([*lines, *(line for method, own in self.changes.items() for line in _say(method, own))])

    def _own(self, method: str, setting: Setting) -> dict[str, Any]:
        return {**self.changes.get(method, {}), **setting.methods.get(method, {})}


def _say(name: str, changes: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {', '.join(f'{key}={value!r}' for key, value in changes.items())}"] if changes else []


# settings of the committed rows: tuned by hand, before the adaptive gamma was the default. Sigma of whitened factors
# falls so steeply that its maximum is uninformative, and a gamma of 0.1 drowned the task's gradient
SVD_SOFT: dict[str, Any] = {"unit": "max", "s": 50.0, "alpha_learning_rate": 8e-3, "gamma": 0.1}
WHITENED_SOFT: dict[str, Any] = {"unit": "mean", "s": 12.5, "alpha_learning_rate": 3.2e-2, "gamma": 0.03}
TUNED = {"svd+soft": SVD_SOFT, "whitened+soft": WHITENED_SOFT}

# settings were chosen on MRPC's dev split and on rows of SST-2's training split that no run trains on (notebook 05)
GRIDS = {
    "quick": Grid(
        Recipe(
            dense_epochs=2,
            epochs=1,
            learning_rate=1e-4,
            static_learning_rate=1e-4,
            calibration_rows=64,
            further_keeps=(0.35,),
            bf16=fast_bf16(),
        ),
        {"docpairs": Setting(train_rows=512, max_length=40)},
        (0, 1),
        (
            Pass(("whitened+uniform", "whitened+soft", *CLIFF), (0.5,)),  # svd's own two are notebook 04's
            Pass(
                ("svd+uniform", "fwsvd+uniform", "asvd+uniform", "whitened+energy", "whitened+greedy"),
                (0.5,),
                recover=False,
            ),
        ),
    ),
    "laptop": Grid(
        Recipe(
            epochs=1,
            learning_rate=5e-5,
            static_learning_rate=5e-5,
            further_keeps=(0.5, 0.35),
            bf16=fast_bf16(),
        ),
        {
            "mrpc": Setting(),
            "rte": Setting({"epochs": 0.75}),
            "sst2": Setting({"epochs": 0.2, "dense_epochs": 2}, train_rows=16000),
        },
        (0, 1, 2),
        (
            Pass((*BASELINES, *SOFT), (0.5,)),
            Pass((*BASELINES, *SOFT), (0.35, 0.75)),
            Pass(OTHERS, (0.5,)),
            Pass(UNTUNED, (0.5, 0.35, 0.75), recover=False),
            Pass(OTHERS, (0.35, 0.75)),
            Pass(CLIFF, (0.5, 0.35)),
            # layers that it leaves whole at three quarters cannot be cut to one half afterwards
            Pass(CLIFF, (0.75,), changes={"further_keeps": ()}),
        ),
        TUNED,
    ),
}
# at one half of the linears these are the budget, length and epochs of results/public.csv
GRIDS["paper"] = Grid(
    GRIDS["laptop"].recipe.changed(epochs=3, bf16=False),
    {
        "mrpc": Setting(),
        "rte": Setting(),
        "sst2": Setting(),
        "cola": Setting(),
        "stsb": Setting(),
    },
    (0, 1, 2, 3, 4),
    GRIDS["laptop"].passes,
)


Cell = tuple[Job, Run]


def run_grid(
    grid: Grid,
    benches: Mapping[str, Bench],
    *,
    stored_only: bool = False,
    processes: int | None = None,
    note: Callable[[str], None] = print,
    grown: Callable[[list[Cell]], None] = lambda cells: None,
) -> list[Cell]:
    """Run every missing cell and return all cells, the dense model of a seed once.

    Parameters
    ----------
    grid : Grid
    benches : mapping
        The bench of each task.
    stored_only : bool
        Run nothing: return the stored cells.
    processes : int, optional
        Cells at a time; `softlms.experiments.jobs.available_processes` when not given.
    note : callable
        Called with a line for each cell done.
    grown : callable
        Called with the cells so far after each new one, to store their rows.

    Returns
    -------
    list of (Job, Run)
        In the grid's order, not in the order of completion.

    Raises
    ------
    FileNotFoundError
        `stored_only`, and nothing is stored.
    """
    units = list(grid.units(benches))
    place = {job: number for number, job in enumerate(job for unit in units for job in unit)}
    stored = {job: run for unit in units for job in unit if (run := job.bench.stored(job.method, job.recipe, job.seed))}
    for line in tell_stored(job for unit in units for job in unit):
        note(line)
    if stored_only and not stored:
        raise FileNotFoundError("No cell of this grid is stored here yet: run it with stored_only = False.")
    cells = stored.copy()
    missing = [] if stored_only else [[job for job in unit if job not in stored] for unit in units]
    total, started = sum(map(len, missing)), time.monotonic()
    processes = processes or available_processes(max(bench.threads for bench in benches.values()))
    for done, (job, run) in enumerate(run_jobs([u for u in missing if u], processes), 1):
        task, left = job.bench.data.task, (time.monotonic() - started) / done * (total - done)
        untuned = "" if job.recipe.epochs or job.method == "dense" else " untuned"
        note(
            f"{done:>4} of {total}: {task.name}, keep {job.recipe.keep}, {job.method}{untuned}, seed {job.seed}: "
            f"dev {task.metrics[0]} {run.result['scores']['dev'][task.metrics[0]]:.3f}; about {left / 60:.0f} min left"
        )
        cells[job] = run
        grown(_once(cells, place))
    return _once(cells, place)


def _once(cells: Mapping[Job, Run], place: Mapping[Job, int]) -> list[Cell]:
    """The dense model is in many units but counts once."""
    unique = {}
    for job, run in sorted(cells.items(), key=lambda cell: place[cell[0]]):
        budget = None if job.method == "dense" else (job.recipe.keep, bool(job.recipe.epochs))
        unique[job.bench.data.task.name, job.method, budget, job.seed] = (job, run)
    return list(unique.values())


def grid_rows(cells: Iterable[Cell]) -> pd.DataFrame:
    """One tidy row for each score.

    Columns: task, method, factorize, allocate, keep, seed (that of the run: one dense model may serve all), recovered,
    split, metric, value (0 to 1, except perplexity), max_length (tokens per row), epochs (of learning ranks and
    recovery), kept_linear, kept_total, parameters_linear, parameters_total, steps, frozen_at, seconds, hardware,
    versions, commit, data, encoder.
    """
    keys = ["task", "keep", "method", "recovered", "seed", "split", "metric"]
    rows = pd.concat(_cell_rows(job, run) for job, run in cells)
    # a recovered run measures its untuned state too
    return rows.drop_duplicates(keys).sort_values(keys, ignore_index=True)


def rank_rows(cells: Iterable[Cell]) -> pd.DataFrame:
    """One tidy row for each layer of each recovered model.

    Columns: task, method, keep, seed, layer, block, symbol, m, n (outputs and inputs), rank.
    """
    recovered = [(job, run) for job, run in cells if job.recipe.epochs and job.method != "dense"]
    benches = {job.bench.data.task.name: job.bench for job, _ in recovered}
    targets = {task: {t.name: t for t in find_targets(bench.skeleton())} for task, bench in benches.items()}
    rows = [
        (task, job.method, job.recipe.keep, job.seed, layer, target.block, target.symbol, *target.shape, rank)
        for job, run in recovered
        for task in [job.bench.data.task.name]
        for layer, rank in run.result["ranks"].items()
        for target in [targets[task][layer]]
    ]
    return pd.DataFrame(rows, columns=RANK_COLUMNS)


def middle_budget(ranks: pd.DataFrame) -> pd.DataFrame:
    """Ranks of the first task at the middle budget, of those below 1."""
    keeps = sorted(ranks[ranks.keep < 1].keep.unique())
    return ranks[(ranks.keep == keeps[len(keeps) // 2]) & (ranks.task == ranks.task.iloc[0])]


def leading_metric(task: str) -> str:
    """The first of a task's metrics; perplexity for text."""
    return TASKS[task].metrics[0] if task in TASKS else "perplexity"


def _cell_rows(job: Job, run: Run) -> pd.DataFrame:
    result = run.result
    links = [] if job.method == "dense" else parse(job.method)
    cell = {
        "task": job.bench.data.task.name,
        "method": job.method,
        "factorize": "+".join(link.said["factors"] for link in links if "factors" in link.said),
        "allocate": "+".join(link.method.name for link in links),
        "keep": 1.0 if job.method == "dense" else job.recipe.keep,
        "seed": result["seed"],
        "max_length": job.bench.max_length,
    }
    counts = ("kept_linear", "kept_total", "parameters_linear", "parameters_total", "steps")
    origin = ("seconds", "hardware", "versions", "commit", "data", "encoder")
    facts = {key: result[key] for key in (*counts, *origin)} | {"frozen_at": result.get("frozen_at")}
    facts["epochs"] = 0 if job.method == "dense" else job.recipe.epochs
    scores = [(bool(job.recipe.epochs) or job.method == "dense", split, s) for split, s in result["scores"].items()]
    if job.recipe.epochs and "untuned" in result:
        scores += [(False, split, values) for split, values in result["untuned"].items()]
    no_training = {"epochs": 0, "steps": 0, "seconds": None, "frozen_at": None}
    rows = [
        cell | {"recovered": recovered, "split": split, "metric": metric, "value": value}
        | (facts if recovered else facts | no_training)
        for recovered, split, values in scores
        for metric, value in values.items()
    ]  # fmt: skip
    for keep, splits in result.get("further", {}).items():
        # a smaller model cut from this one: its budget is exact; other counts are not stored
        exact = float(keep) if job.recipe.count == "linear" else None
        cut = {"kept_linear": exact} | dict.fromkeys(("kept_total", "parameters_linear", "parameters_total"))
        rows += [
            cell | {"keep": float(keep), "method": f"{job.method}{CUT_FROM}{job.recipe.keep}", "recovered": True}
            | {"split": split, "metric": metric, "value": value} | facts | cut
            for split, values in splits.items()
            for metric, value in values.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of every score, in %; perplexity unscaled."""
    keys = ["task", "keep", "method", "recovered", "split", "metric"]
    values = rows.value.where(rows.metric.isin(UNSCALED), 100 * rows.value)
    summary = values.groupby([rows[key] for key in keys], sort=False).agg(["mean", "std", "count"])
    return summary.reset_index()


def costs(
    bench: Bench, profiles: Mapping[str, Mapping[str, int]], *, tokens: int = 128, rounds: int = 15
) -> pd.DataFrame:
    """FLOPs and forward time of deployed models against dense, from ranks alone: weights do not matter for speed.

    Parameters
    ----------
    bench : Bench
        The bench of the model.
    profiles : mapping
        Ranks of each model, by the name of its row.
    tokens : int
        Tokens per row; batches of 8 rows.
    rounds : int
        Interleaved rounds, after two warm-up rounds; one thread.

    Returns
    -------
    DataFrame
        Columns row, gflops (per batch), flops_of_dense, ms (median), quartile1_ms, quartile3_ms, speedup; its ``attrs``
        name the hardware.
    """
    models = {"dense": bench.untrained_model().eval()}
    models |= {row: shrink(bench.prepare(bench.untrained_model()).eval(), ranks) for row, ranks in profiles.items()}
    inputs = random_rows(models["dense"].config.vocab_size, 8, tokens)
    flops, calls = {}, {}
    with fast_scan(), torch.inference_mode():
        for row, model in models.items():
            with FlopCounterMode(display=False) as counter:
                model(**inputs)
            flops[row] = counter.get_total_flops()
            calls[row] = partial(model, **inputs)
        with use_threads(1):
            seconds = interleaved(calls, rounds, "timing forwards")
    table = []
    for row, times in summarize_times(seconds).items():
        speedup, ms = times.pop("speed_up"), times.pop("median_ms")
        shares = {"gflops": flops[row] / 1e9, "flops_of_dense": flops[row] / flops["dense"]}
        table.append({"row": row, **shares, "ms": ms, **times, "speedup": speedup})
    made = pd.DataFrame(table)
    made.attrs["hardware"] = hardware(1)
    return made
