"""The ``softlms`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 if a notebook failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="softlms", description="Learned ranks for language models: the workbook.")
    commands = parser.add_subparsers(dest="command", required=True)

    figures = commands.add_parser("figures", help="run notebooks headless and leave figures, tables and a summary")
    figures.add_argument("notebooks", nargs="*", help="names or their beginnings, such as 03; all when none is given")
    figures.add_argument("--profile", default="quick", help="quick (default), laptop or paper")
    figures.add_argument("--data", default="", help="folder in GLUE's layout, or hub; default: SOFTLMS_DATA, else hub")
    figures.add_argument("--model", default="", help="folder or hub name of another encoder")

    benchmark = commands.add_parser("benchmark", help="time a training step: dense, soft at full rank, soft at budget")
    benchmark.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    benchmark.add_argument("--batch", type=int, default=16, help="rows a batch (default 16)")
    benchmark.add_argument("--tokens", type=int, default=64, help="tokens a row (default 64)")
    benchmark.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    benchmark.add_argument("--model", default="minilm", help="encoder (default minilm)")
    benchmark.add_argument("--out", default="", help="CSV file to write as well")

    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "figures":
            from softlms.workbook import make_figures

            return make_figures(options.pop("notebooks"), **options)
        from softlms.latency import print_step_times

        print_step_times(**options)
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"softlms {command}: {error}", file=sys.stderr)
        return 2
