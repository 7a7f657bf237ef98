"""The ``softlms`` command. Only the module of the requested command is imported."""

from __future__ import annotations

import argparse
import inspect
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_args, get_type_hints

__all__ = ["main"]

# Each command: its help, the function that it calls, and its options. Options are keywords of that function, or of the
# one after "|" to which it passes them; <name> is positional. Types and defaults come from the signatures.
# fmt: off
COMMANDS = {
    "figures": ("run notebooks headless and write figures, tables and a summary", "workbook.run:make_figures",
                "<names> profile data model text parameters jobs resume replot"),
    "gallery": ("build the site: methods, notebooks, results, figures, API",
                "workbook.gallery:print_gallery|build_gallery", "profile out"),
    "doctor": ("report what is installed, and what would stop the workbook", "workbook.doctor:print_findings", ""),
    "check-notebooks": ("run notebooks under nbval, as configured in notebooks/notebooks.toml",
                        "workbook.stamp:check_notebooks", "<names>"),
    "stamp": ("execute notebooks in place, and stamp them with what they depend on", "workbook.stamp:stamp_notebooks",
              "<names> check"),
    "compress": ("compress a model on a task or a text, let it recover, and save it", "compress:Compression|compress",
                 "model task text keep out data count method factors epochs learning_rate alpha_learning_rate "
                 "distillation dense_epochs dense_learning_rate calibration_rows batch_size max_length train_tokens "
                 "test_tokens seed bf16"),
    "benchmark": ("time a training step: dense, soft at full rank, soft at budget",
                  "experiments.training_cost:print_step_times", "rounds batch tokens threads model out"),
    "benchmark-scan": ("time Mamba's training step or inference with each selective scan",
                       "experiments.training_cost:print_scan_times", "rounds batch tokens threads inference out"),
    "benchmark-speed": ("time dense against thin models at the paper's real sizes",
                        "experiments.speed:print_speed|compare_speed",
                        "<models> layers keep results tokens rounds two_threads out"),
    "full-size": ("compress one of the paper's models at its real size",
                  "experiments.full_size:print_full_size|compress_full_size",
                  "<model> keep count layers split threads out"),
    "training-memory": ("count and measure the memory that a training step takes",
                        "experiments.training_cost:print_training_memory|training_memory",
                        "<model> form=soft layers batch tokens out"),
    "verify": ("check every claim, and compare the generated tables with the rows", "workbook.verify:verify",
               "profile write"),
}
# fmt: on

# by option, or by command and option
HELP = {
    "alpha_learning_rate": "learning rate of the thresholds; by default it follows from factors, budget and steps",
    "batch": "rows in a batch",
    "batch_size": "rows in a step",
    "bf16": "train under bfloat16 autocast",
    "calibration_rows": "training rows for data-aware factors and for gradients",
    "check": "execute nothing: list the stale ones, and why",
    "count": "what keep is a share of: linear, total, flops or latency",
    "full-size count": "what keep is a share of: total or linear",
    "data": "folder in GLUE's layout, hub or hub@revision, or embedded for docpairs",
    "figures data": "folder in GLUE's layout, or hub; by default SOFTLMS_DATA, else hub",
    "dense_epochs": "epochs of fine-tuning, if the model has no head yet",
    "dense_learning_rate": "learning rate of that fine-tuning",
    "distillation": "share of the dense model's logits in the loss",
    "epochs": "epochs of compressing and recovering",
    "factors": "svd, fwsvd, asvd, whitened or kfac",
    "form": "dense, soft, or deployed at half of the parameters",
    "inference": "time forward passes instead",
    "jobs": "notebooks at a time; each may use two processes",
    "keep": "share of the parameters to keep",
    "layers": "use only the first blocks, for a quick look",
    "learning_rate": "learning rate of the weights during compression",
    "max_length": "maximum number of tokens in a row (default 128); of a text, tokens in every row (default 256)",
    "method": "method or chain: soft, mask, uniform, energy, greedy, sensitivity",
    "compress model": "classifier, encoder or causal language model: folder, GGUF file, hub name or name@revision, "
    "minilm or smollm2",
    "figures model": "folder or hub name of another encoder",
    "benchmark model": "encoder",
    "full-size model": "bert-base, gpt2, tinyllama-1.1b or mamba-130m (random weights); or a folder or hub name",
    "training-memory model": "bert-base, gpt2, tinyllama-1.1b or mamba-130m (random weights)",
    "models": "bert-base, gpt2, tinyllama-1.1b, mamba-130m; all by default",
    "names": "notebooks by name or prefix, such as 03; all by default",
    "out": "CSV file to append the rows to",
    "benchmark out": "CSV file to write as well",
    "benchmark-scan out": "CSV file to write as well",
    "compress out": "folder for the compressed model",
    "gallery out": "folder of the site",
    "parameters": "any other parameter of the notebooks",
    "profile": "quick, laptop or paper",
    "replot": "run nothing: redraw the figures from the tables",
    "results": "folder with laptop ranks: trained ranks beside uniform ones",
    "resume": "skip notebooks that are finished and unchanged",
    "rounds": "interleaved rounds",
    "seed": "seed of all random numbers",
    "split": "split GPT-2's fused projections first",
    "task": "for a classifier: mrpc, rte, sst2, cola, stsb or docpairs",
    "test_tokens": "use only the first tokens of the text that is scored",
    "text": "text of the language models: folder, hub or embedded",
    "compress text": "for a causal language model: folder with train and valid files, hub or hub@revision, or embedded",
    "threads": "threads",
    "tokens": "tokens in a row",
    "train_tokens": "use only the first tokens of the text that is learned from",
    "two_threads": "time two threads as well as one",
    "write": "write docs/results.md and README's table first",
}
FLAGS = {"jobs": "-j", "parameters": "-p"}
METAVARS = {"names": "notebook", "parameters": "NAME=VALUE"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        0 on success, 1 if a notebook, a claim or a training failed, 2 for bad input, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the console cannot encode are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    name = next((argument for argument in arguments if argument in COMMANDS), None)
    parser = argparse.ArgumentParser(prog="softlms", description="Learned ranks for language models: the workbook.")
    commands = parser.add_subparsers(metavar="command", required=True)
    parsers = {command: commands.add_parser(command, help=entry[0]) for command, entry in COMMANDS.items()}
    if name is None:
        parser.parse_args(arguments)  # exits: help, or an error
        return 2
    try:
        module, functions = COMMANDS[name][1].split(":")
        declared = [getattr(import_module(f"softlms.{module}"), function) for function in functions.split("|")]
        for option in COMMANDS[name][2].split():
            _add_option(parsers[name], name, option, declared)
        given = vars(parser.parse_args(arguments))
        return (_compress(**given) if name == "compress" else declared[0](**given)) or 0
    except KeyboardInterrupt:
        print(f"softlms {name}: stopped.", file=sys.stderr)
        return 130
    except (ImportError, ValueError, OSError) as error:  # ImportError: an extra that is not installed
        print(f"softlms {name}: {_one_line(error)}", file=sys.stderr)
        return 2


def _add_option(parser: argparse.ArgumentParser, command: str, option: str, declared: Sequence[Any]) -> None:
    name, _, default = option.strip("<>").partition("=")
    function = next(function for function in declared if name in inspect.signature(function).parameters)
    kind, default = get_type_hints(function)[name], default or inspect.signature(function).parameters[name].default
    settings: dict[str, Any] = {"help": HELP.get(f"{command} {name}") or HELP[name]}
    positional = option.startswith("<")
    if kind is bool:
        settings["action"] = "store_true"
    elif kind == Sequence[str]:
        settings |= {"nargs": "*"} if positional else {"action": "append", "default": []}
        settings["metavar"] = METAVARS.get(name)
    else:
        settings["type"] = next(iter(get_args(kind)), kind)  # the first type of a union
        if default is not inspect.Parameter.empty:
            settings["default"] = default
            settings["help"] += "" if default in (None, "") else " (default %(default)s)"
        elif not positional:
            settings["required"] = True
    if positional:
        parser.add_argument(name, **settings)
    else:
        parser.add_argument(FLAGS.get(name, f"--{name.replace('_', '-')}"), dest=name, **settings)


def _compress(*, out: str, **settings: Any) -> int:
    from softlms.compress import Compression, compress

    try:
        compress(Compression(**settings), out)
    except RuntimeError as error:  # training diverged, or out of memory
        print(f"softlms compress: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    """Errors of other libraries may span several lines."""
    return " ".join(str(error).split())
