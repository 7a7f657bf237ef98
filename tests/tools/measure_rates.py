"""Try learning rates where nothing is reported, and add all trials to a CSV file.

    python tests/tools/measure_rates.py mrpc --data DIR --out results/laptop/05_bert_table_rates.csv
    python tests/tools/measure_rates.py llama --out results/laptop/language_rates.csv

The settings are those of profile laptop, for the methods of which one is recommended. A task is scored on dev; sst2, of
which dev is reported, on training rows that no run trains on. Runs are stored under runs/, so that it goes on where it
was stopped. Not part of the test suite: it takes an hour.
"""

import argparse
from dataclasses import replace

import pandas as pd
import torch

from softlms.data.encoders import find_encoder
from softlms.data.tasks import load_task
from softlms.experiments.bench import Bench
from softlms.experiments.grid import GRIDS, PARTS
from softlms.experiments.jobs import Job, available_processes, be_quiet, run_jobs
from softlms.experiments.language_models import FAMILIES
from softlms.experiments.provenance import append_rows
from softlms.workbook.book import open_language_book
from softlms.workbook.registry import project_root

UNSEEN = range(30000, 32000)  # training rows of SST-2


def bench_of(name, data):
    """The bench, its grid, and what "dev" is."""
    if name in FAMILIES:
        book = open_language_book(f"rates_{name}", name, profile="laptop")
        return book.bench, book.profile.grid, "dev"
    grid, task, where = GRIDS["laptop"], load_task(name, data), "dev"
    if name == "sst2":
        train, where = task.splits["train"], f"training rows {UNSEEN[0]} to {UNSEEN[-1]}, on which no run trains"
        task = replace(task, splits={"train": train, "dev": train.select(UNSEEN)})
    setting = grid.tasks[name]
    bench = Bench(find_encoder("minilm"), task, project_root() / "runs", setting.max_length, setting.train_rows)
    return bench, grid, where


def row_of(job, run, where):
    row = {"task": job.bench.data.task.name, "method": job.method, "keep": job.recipe.keep, "seed": job.seed}
    soft = run.result.get("frozen_at")
    row |= {"rate": job.recipe.learning_rate, "frozen_at": soft, "steps": run.result["steps"], "scored_on": where}
    row |= run.result["scores"]["dev"]
    return row | {name: run.result[name] for name in ("hardware", "versions", "data", "commit")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("mrpc", "sst2", *FAMILIES))
    parser.add_argument("--data", default="hub", help="folder in GLUE's layout, or hub")
    parser.add_argument("--methods", nargs="+", default=PARTS["recommended"])
    parser.add_argument("--rates", type=float, nargs="+", default=(5e-5, 1e-4, 2e-4, 4e-4))
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.5, 0.35))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--out", required=True, help="CSV file, to which these trials are added")
    options = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    bench, grid, where = bench_of(options.what, options.data)
    recipe = grid.recipe.changed(**grid.tasks[options.what].changes)
    rates = [{"learning_rate": rate, "static_learning_rate": rate} for rate in options.rates]
    units = [
        [Job(bench, method, recipe.changed(keep=keep, **rate), seed) for method in options.methods]
        for seed in options.seeds
        for rate in rates
        for keep in options.keeps
    ]
    rows = []
    for job, run in run_jobs([[Job(bench, "dense", recipe, options.seeds[0])], *units], available_processes(1)):
        if job.method != "dense":
            rows.append(row_of(job, run, where))
            print(rows[-1], flush=True)
    append_rows(options.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
