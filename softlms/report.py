"""Tables and drawings of a grid's cells: what notebooks 05 to 08 show, made in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from softlms.architectures import find_targets
from softlms.comparison import UNSCALED, Cell, costs, grid_rows, rank_rows, summarize
from softlms.evaluation import paired_difference
from softlms.experiments import Bench
from softlms.layers import kept_parameters
from softlms.plotting import figure

__all__ = ["Report"]

# Okabe and Ito's palette
COLOURS = {"svd": "#D55E00", "fwsvd": "#E69F00", "asvd": "#CC79A7", "whitened": "#0072B2"}
MARKERS = {"uniform": "v", "energy": "P", "greedy": "X", "sensitivity": "D", "mask": "s", "soft": "o"}
VERDICT = (
    "task", "keep", "split", "soft", "soft_mean", "rival", "rival_mean", "seeds", "difference", "low95", "high95",
)  # fmt: skip
CUT_FROM = " cut from "  # rows of a soft model that was cut further, see comparison.grid_rows


class Report:
    """What came of a grid.

    Parameters
    ----------
    cells : sequence of (Job, Run)
        From `softlms.comparison.run_grid`.
    benches : mapping
        The bench of each task.
    seeds : sequence of int
        Of the grid: an entry that has fewer says so.

    Attributes
    ----------
    rows, ranks, summary : DataFrame
        See `softlms.comparison.grid_rows`, `rank_rows` and `summarize`.
    leading : dict
        Each task's first metric.
    reported : dict
        "test" where a task has one with public labels, else "dev".

    Raises
    ------
    ValueError
        A comparison mixes hardware, or a compressed model does not fill its budget from below.
    """

    def __init__(self, cells: Sequence[Cell], benches: Mapping[str, Bench], seeds: Sequence[int]) -> None:
        self.cells, self.benches, self.seeds = cells, benches, seeds
        self.rows, self.ranks = grid_rows(cells), rank_rows(cells)
        self.summary = summarize(self.rows)
        self.leading = {task: bench.data.task.metrics[0] for task, bench in benches.items()}
        with_test = set(self.rows[self.rows.split == "test"].task)
        self.reported = {task: "test" if task in with_test else "dev" for task in benches}
        self.compressed = self.rows[(self.rows.method != "dense") & ~self.rows.method.str.contains(CUT_FROM)]
        self.methods = list(self.compressed.method.unique())
        if (mixed := self.rows.groupby("task").hardware.nunique()).gt(1).any():
            raise ValueError(f"Rows of {mixed.idxmax()} were made on {mixed.max()} kinds of hardware: run it on one.")
        kept = self.compressed[f"kept_{cells[0][0].recipe.count}"]
        missed = ~kept.between(self.compressed.keep - 0.01, self.compressed.keep)
        if missed.any():
            raise ValueError(f"Not filled to the budget: {self.compressed[missed].iloc[0].to_dict()}.")

    def table(self, split: str) -> pd.DataFrame | None:
        """Mean and standard deviation of every method on a split, untuned and recovered; None where it has no rows."""
        part = self.summary[(self.summary.split == split) & ~self.summary.method.str.contains(CUT_FROM)].copy()
        if part.empty:
            return None
        part["cell"] = part.apply(self._entry, axis=1)
        part["column"] = np.where(part.recovered, "recovered", "untuned")
        done = [job.method for job, _ in self.cells if job.method != "dense"]
        order = ["dense", *dict.fromkeys(done)]
        table = part.pivot_table(
            index=["task", "keep", "method"], columns=["metric", "column"], values="cell", aggfunc="first", sort=False
        )
        places = {"task": list(self.benches).index, "keep": lambda keep: -keep, "method": order.index}
        table = table.sort_index(key=lambda index: index.map(places[index.name]))
        return table.sort_index(axis=1).fillna("")

    def _entry(self, row: pd.Series) -> str:
        # one dense model may serve all seeds
        seeds = f" ({row['count']})" if row["count"] < len(self.seeds) and row["method"] != "dense" else ""
        digits = 2 if row["metric"] in UNSCALED else 1
        spread = f" ± {row['std']:.{digits}f}" if row["count"] > 1 else ""
        return f"{row['mean']:.{digits}f}{spread}{seeds}"

    def verdicts(self) -> pd.DataFrame:
        """The better SoftLMs row against the best other one and, where that is another, the best with uniform ranks.

        All chosen on dev, among the methods that were run at all seeds; paired over seeds on the reported split.

        Columns `VERDICT`; a difference above zero is in favour of SoftLMs, also where less is better. The 95 % interval
        needs two seeds.
        """
        recovered = self.compressed[self.compressed.recovered]
        lines = []
        for (task, keep), _ in recovered.groupby(["task", "keep"]):
            lower = self.leading[task] in UNSCALED
            order = self._by_seed(task, keep, "dev").dropna(axis=1).mean().sort_values(ascending=lower).index
            soft, others = (order[order.str.endswith("+soft") == is_soft] for is_soft in (True, False))
            rivals = [*others[:1], *others[others.str.endswith("+uniform")][:1]] if len(soft) else []
            table = self._by_seed(task, keep, self.reported[task])
            for rival in dict.fromkeys(rivals):
                pair = table[[soft[0], rival]].dropna()
                larger, smaller = (rival, soft[0]) if lower else (soft[0], rival)
                line = {"task": task, "keep": keep, "split": self.reported[task]}
                line |= {"soft": soft[0], "soft_mean": table[soft[0]].mean()}
                line |= {"rival": rival, "rival_mean": table[rival].mean()}
                line |= {"seeds": len(pair), "difference": (pair[larger] - pair[smaller]).mean()}
                if len(pair) > 1:
                    _, line["low95"], line["high95"] = paired_difference(pair[larger], pair[smaller])
                lines.append(line)
        return pd.DataFrame(lines, columns=VERDICT)

    def _by_seed(self, task: str, keep: float, split: str) -> pd.DataFrame:
        """The leading metric after recovery: a row for each seed, a column for each method."""
        part = self.compressed[(self.compressed.task == task) & (self.compressed.keep == keep)]
        part = part[part.recovered & (part.split == split) & (part.metric == self.leading[task])]
        scale = 1 if self.leading[task] in UNSCALED else 100
        return scale * part.pivot_table(index="seed", columns="method", values="value")

    @cached_property
    def keeps(self) -> list[float]:
        return sorted(self.compressed.keep.unique())

    def plot_quality(self) -> Figure:
        """Quality against size: a column for each task, untuned above, recovered below."""
        width = min(7.0, 2.2 + 2.4 * len(self.benches))
        fig, axes = figure(2, len(self.benches), width=width, height=4.6, squeeze=False)
        for column, (task, metric) in enumerate(self.leading.items()):
            of_task = self.summary[(self.summary.task == task) & (self.summary.metric == metric)]
            unit = "" if metric in UNSCALED else " (%)"
            for ax, recovered in zip(axes[:, column], (False, True), strict=True):
                split = self.reported[task] if recovered else "dev"
                of_split = of_task[of_task.split == split]
                ax.axhline(of_split[of_split.method == "dense"]["mean"].iloc[0], color="black", lw=1)
                part = of_split[(of_split.recovered == recovered) & of_split.method.isin(self.methods)]
                self._plot_methods(ax, part)
                ax.set_xticks(range(len(self.keeps)), [f"{100 * keep:.0f}" for keep in self.keeps])
                ax.set_xlim(-0.5, len(self.keeps) - 0.5)
                if metric in UNSCALED and part["mean"].max() > 10 * part["mean"].min():
                    ax.set_yscale("log")  # untuned perplexities may span orders of magnitude
                ax.grid(axis="x", visible=False)
                ax.set(
                    title=f"{task}, {'after recovery' if recovered else 'untuned'}",
                    xlabel="weights of the linears kept (%)",
                    ylabel=f"{split} {metric}{unit}",
                )
        fig.legend(handles=self._legend(), loc="outside lower center", ncols=6)
        fig.suptitle("Quality against size (mean, std over seeds)")
        return fig

    def _plot_methods(self, ax, part: pd.DataFrame) -> None:  # type: ignore[no-untyped-def]
        methods = sorted(part.method.unique(), key=lambda m: (list(COLOURS).index(m.split("+")[0]), m))
        for i, method in enumerate(methods):
            factorization, allocation = method.split("+")
            line, soft = part[part.method == method].sort_values("keep"), allocation == "soft"
            side = 0.7 * ((i + 0.5) / len(methods) - 0.5)
            ax.errorbar(
                [self.keeps.index(keep) + side for keep in line.keep], line["mean"], line["std"].fillna(0),
                color=COLOURS[factorization], marker=MARKERS[allocation], ls="-" if soft else "none",
                lw=0.8, elinewidth=0.8, ms=4, mfc=COLOURS[factorization] if soft else "white",
            )  # fmt: skip

    def _legend(self) -> list[Line2D]:
        factorizations, allocations = (dict.fromkeys(m.split("+")[i] for m in self.methods) for i in (0, 1))
        handles = [Line2D([], [], color="black", label="dense")]
        handles += [Line2D([], [], color=c, label=f) for f, c in COLOURS.items() if f in factorizations]
        return handles + [
            Line2D([], [], color="0.3", marker=m, ls="", mfc="0.3" if a == "soft" else "white", label=a)
            for a, m in MARKERS.items()
            if a in allocations
        ]

    def plot_ranks(self) -> Figure:
        """Share of each layer's weights that is stored, at the middle budget on the first task, mean over seeds."""
        task, part = next(iter(self.benches)), self._middle()
        targets = {target.name: target for target in find_targets(self.benches[task].skeleton())}
        chosen = [targets[layer] for layer in part.layer]
        shares = [
            kept_parameters(*t.shape, rank) / np.prod(t.shape) for t, rank in zip(chosen, part["rank"], strict=True)
        ]
        shown = part.assign(share=shares, block=[t.block for t in chosen], symbol=[t.symbol for t in chosen])
        symbols = list(dict.fromkeys(target.symbol for target in targets.values()))
        methods = list(shown.method.unique())
        height = -(-len(methods) // 4)
        width = -(-len(methods) // height)
        fig, axes = figure(height, width, width=7.0, height=1.9 * height + 0.4, squeeze=False, sharey=True)
        for ax in axes.flat[len(methods) :]:
            ax.axis("off")
        for ax, method in zip(axes.flat, methods, strict=False):
            shares_of = shown[shown.method == method].pivot_table(index="symbol", columns="block", values="share")
            sns.heatmap(shares_of.loc[symbols], ax=ax, vmin=0, vmax=1, cmap="cividis", cbar=False, linewidths=0.3)
            ax.grid(visible=False)
            ax.set(title=method, xlabel="block", ylabel="")
            ax.tick_params(axis="y", rotation=0)
        fig.colorbar(axes[0, 0].collections[0], ax=axes, label="weights stored")
        fig.suptitle(f"Where {part.keep.iloc[0]:.0%} of the linears' weights are spent, {task}, mean over seeds")
        return fig

    def _middle(self) -> pd.DataFrame:
        """Ranks of the first task at the budget in the middle."""
        keeps = sorted(self.ranks.keep.unique())
        return self.ranks[
            (self.ranks.keep == keeps[len(keeps) // 2]) & (self.ranks.task == next(iter(self.benches)))
        ].copy()

    def cut_further(self) -> pd.DataFrame:
        """Soft models cut to smaller budgets without training, beside those that were trained for that size; on dev."""
        of_dev = self.summary[(self.summary.split == "dev") & self.summary.recovered]
        further = of_dev[of_dev.method.str.contains(CUT_FROM)].copy()
        trained = {(r.task, r.keep, r.metric, r.method): self._entry(r) for _, r in of_dev.iterrows()}
        further["cut further"] = [self._entry(row) for _, row in further.iterrows()]
        further["trained for it"] = [
            trained.get((row.task, row.keep, row.metric, row.method.split(CUT_FROM)[0]), "")
            for _, row in further.iterrows()
        ]
        return further[["task", "metric", "method", "keep", "cut further", "trained for it"]]

    def costs(self, **options: int) -> pd.DataFrame:
        """FLOPs and time at the middle budget with the first seed's ranks; see `softlms.comparison.costs`.

        Methods of equal ranks are one row, which names them all.
        """
        part = self._middle()
        first = part[part.seed == part.seed.min()]
        kinds: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for method, ranks in first.groupby("method", sort=False):
            kinds.setdefault(tuple(zip(ranks.layer, ranks["rank"], strict=True)), []).append(str(method))
        profiles = {f"{', '.join(names)} at {first.keep.iloc[0]}": dict(ranks) for ranks, names in kinds.items()}
        return costs(next(iter(self.benches.values())), profiles, **options)

    def samples(self) -> pd.DataFrame:
        """What each model of the first seed writes after the same opening: dense, then every method and budget."""
        return pd.DataFrame(
            {"task": job.bench.data.task.name, "keep": 1.0 if job.method == "dense" else job.recipe.keep}
            | {"method": job.method, "sample": run.result["sample"]}
            for job, run in self.cells
            if (job.recipe.epochs or job.method == "dense") and job.seed == min(self.seeds)
        )
