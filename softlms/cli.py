"""The ``softlms`` command."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]

# the defaults are those of softlms.compress.Compression, which --help should not wait for
COMPRESSION_OPTIONS = {
    "data": (str, "folder in GLUE's layout, hub (default) or hub@revision, or embedded for docpairs"),
    "count": (str, "what keep is a share of: linear (default), total, flops or latency"),
    "factors": (str, "svd, fwsvd, asvd or whitened (default)"),
    "epochs": (float, "of compressing and recovering (default 3)"),
    "learning_rate": (float, "of the weights then (default 5e-5)"),
    "alpha_learning_rate": (float, "of the thresholds (follows from factors, budget and steps)"),
    "distillation": (float, "share of the dense model's logits in the loss (default 0.9)"),
    "dense_epochs": (float, "of fine-tuning, where the model has no head yet (default 3)"),
    "dense_learning_rate": (float, "of that fine-tuning (default 5e-5)"),
    "calibration_rows": (int, "training rows for data-aware factors (default 256)"),
    "batch_size": (int, "rows a step (default 16)"),
    "max_length": (int, "tokens a row at most (default 128)"),
    "seed": (int, "default 0"),
}

# command to module and function of softlms, which takes the command's options; what it returns is the exit status
FUNCTIONS = {
    "figures": "workbook.run:make_figures",
    "gallery": "workbook.gallery:print_gallery",
    "doctor": "workbook.doctor:print_findings",
    "check-notebooks": "workbook.check:check_notebooks",
    "stamp": "workbook.stamp:stamp_notebooks",
    "verify": "workbook.verify:verify",
    "full-size": "experiments.full_size:print_full_size",
    "training-memory": "experiments.training_memory:print_training_memory",
    "benchmark": "experiments.latency:print_step_times",
    "benchmark-scan": "experiments.latency:print_scan_times",
    "benchmark-speed": "experiments.speed:print_speed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 if a notebook, a claim or a training failed, 2 for bad input, 130 after
    Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="softlms", description="Learned ranks for language models: the workbook.")
    commands = parser.add_subparsers(dest="command", required=True)

    figures = commands.add_parser("figures", help="run notebooks headless and leave figures, tables and a summary")
    figures.add_argument(
        "names", metavar="notebook", nargs="*", help="names or their beginnings, such as 03; all when none is given"
    )
    figures.add_argument("--profile", default="quick", help="quick (default), laptop or paper")
    figures.add_argument("--data", default="", help="folder in GLUE's layout, or hub; default: SOFTLMS_DATA, else hub")
    figures.add_argument("--model", default="", help="folder or hub name of another encoder")
    figures.add_argument("--text", default="", help="text of the language models: folder, hub or embedded")
    figures.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="any other parameter of theirs"
    )
    figures.add_argument(
        "-j", dest="jobs", type=int, default=1, help="notebooks at a time (default 1); each may use two processes"
    )
    figures.add_argument("--resume", action="store_true", help="leave out notebooks that are finished and unchanged")
    figures.add_argument("--replot", action="store_true", help="run nothing: draw the figures again from the tables")

    gallery = commands.add_parser("gallery", help="build the site: methods, notebooks, results, figures, API")
    gallery.add_argument("--profile", default="laptop", help="quick, laptop (default) or paper")
    gallery.add_argument("--out", default="site", help="folder (default site)")

    commands.add_parser("doctor", help="say what is installed here, and what would stop the workbook")
    check = commands.add_parser("check-notebooks", help="run notebooks under nbval, as notebooks/lanes.toml says")
    check.add_argument("jobs", nargs="*", help="sections of lanes.toml; all when none is given")

    stamp = commands.add_parser("stamp", help="execute notebooks in place, and stamp them with what they depend on")
    stamp.add_argument(
        "names", metavar="notebook", nargs="*", help="names or their beginnings, such as 03; all when none is given"
    )
    stamp.add_argument("--check", action="store_true", help="execute nothing: say which are stale, and why")

    shrink = commands.add_parser("compress", help="compress a model on a task: learned ranks, recovered, saved")
    shrink.add_argument(
        "--model", required=True, help="classifier or encoder: folder, hub name or name@revision, minilm"
    )
    shrink.add_argument("--task", required=True, help="mrpc, rte, sst2, cola, stsb or docpairs")
    shrink.add_argument("--keep", required=True, type=float, help="share of parameters that stays")
    shrink.add_argument("--out", required=True, help="folder for the compressed model")
    for name, (kind, meaning) in COMPRESSION_OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        shrink.add_argument(option, type=kind, default=argparse.SUPPRESS, help=meaning)
    shrink.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")

    benchmark = commands.add_parser("benchmark", help="time a training step: dense, soft at full rank, soft at budget")
    benchmark.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    benchmark.add_argument("--batch", type=int, default=16, help="rows a batch (default 16)")
    benchmark.add_argument("--tokens", type=int, default=64, help="tokens a row (default 64)")
    benchmark.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    benchmark.add_argument("--model", default="minilm", help="encoder (default minilm)")
    benchmark.add_argument("--out", default="", help="CSV file to write as well")

    scan = commands.add_parser(
        "benchmark-scan", help="time Mamba's training step or inference with each selective scan"
    )
    scan.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    scan.add_argument("--batch", type=int, default=16, help="rows a batch (default 16)")
    scan.add_argument("--tokens", type=int, default=128, help="tokens a row (default 128)")
    scan.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    scan.add_argument("--inference", action="store_true", help="time forward passes instead")
    scan.add_argument("--out", default="", help="CSV file to write as well")

    speed = commands.add_parser("benchmark-speed", help="time dense against thin at the paper's real sizes")
    speed.add_argument("models", nargs="*", help="bert-base, gpt2, tinyllama-1.1b, mamba-130m; all when none is given")
    speed.add_argument("--layers", type=int, help="only so many blocks, for a quick look")
    speed.add_argument("--keep", type=float, default=0.5, help="share of all parameters that stays (default 0.5)")
    speed.add_argument("--results", default="", help="folder with laptop ranks: trained ranks beside uniform ones")
    speed.add_argument("--tokens", type=int, default=128, help="tokens a row (default 128)")
    speed.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    speed.add_argument("--two-threads", action="store_true", help="time two threads as well as one")
    speed.add_argument("--out", default="", help="CSV file that gets these rows more")

    full_size = commands.add_parser("full-size", help="compress one of the paper's models at its real size")
    full_size.add_argument(
        "model", help="bert-base, gpt2, tinyllama-1.1b, mamba-130m (random weights); folder, hub name"
    )
    full_size.add_argument("--keep", type=float, default=0.5, help="share of parameters that stays (default 0.5)")
    full_size.add_argument("--count", default="total", help="what keep is a share of: total (default) or linear")
    full_size.add_argument("--layers", type=int, help="only so many blocks, for a quick look")
    full_size.add_argument("--split", action="store_true", help="take GPT-2's fused projections apart first")
    full_size.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    full_size.add_argument("--out", default="", help="CSV file that gets a row more")

    memory = commands.add_parser("training-memory", help="count and measure what memory a training step takes")
    memory.add_argument("model", help="bert-base, gpt2, tinyllama-1.1b or mamba-130m (random weights)")
    memory.add_argument("--form", default="soft", help="dense, soft (default), or deployed at half of the total")
    memory.add_argument("--layers", type=int, help="only so many blocks")
    memory.add_argument("--batch", type=int, default=1, help="rows (default 1)")
    memory.add_argument("--tokens", type=int, default=128, help="tokens a row (default 128)")
    memory.add_argument("--out", default="", help="CSV file that gets a row more")

    verify = commands.add_parser("verify", help="judge every claim, and hold the generated tables against the rows")
    verify.add_argument("--profile", default="laptop", help="whose rows: quick, laptop (default) or paper")
    verify.add_argument("--write", action="store_true", help="write docs/results.md and README's table anew first")

    for stream in (sys.stdout, sys.stderr):  # what a console's encoding lacks is written as its code, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "figures" and options.pop("replot"):
            if given := [n for n in options if n not in ("names", "profile") and options[n] != figures.get_default(n)]:
                raise ValueError(f"--replot runs no notebook: {', '.join(given)} would mean nothing.")
            return _call("workbook.run:replot_figures", names=options["names"], profile=options["profile"])
        if command == "compress":
            return _compress(options.pop("out"), options)
        return _call(FUNCTIONS[command], **options)
    except KeyboardInterrupt:
        print(f"softlms {command}: stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"softlms {command}: {_one_line(error)}", file=sys.stderr)
        return 2


def _compress(out: str, options: dict[str, Any]) -> int:
    from softlms.compress import Compression, compress

    try:
        compress(Compression(**options), out)
    except RuntimeError as error:  # training diverged, or memory ran out
        print(f"softlms compress: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    """Errors of other libraries may have many lines."""
    return " ".join(str(error).split())


def _call(function: str, **options: Any) -> int:
    """Imported when it is wanted: --help should not wait for torch."""
    module, name = function.split(":")
    status: int | None = getattr(importlib.import_module(f"softlms.{module}"), name)(**options)
    return status or 0
