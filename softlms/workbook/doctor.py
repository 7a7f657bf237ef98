"""What the workbook finds on this machine, and what would stop it, with a fix for each problem."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softlms.data import encoders as zoo
from softlms.data import glue
from softlms.data.hub import is_hub
from softlms.data.named import NAMED
from softlms.utils.machine import fast_bf16, hardware

__all__ = ["Finding", "examine", "print_findings"]

INSTALL = 'pip install -c requirements.txt -e ".[workbook,export,docs,test]"'
INSTALL_ENCODER = NAMED["minilm"].install
SHOWN = ("torch", "transformers", "datasets", "numpy", "numba", "mambapy", "onnxruntime")
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}
HUB_SECONDS = 3
LEAST_DISK, LEAST_MEMORY = 1, 4  # GB; a laptop grid stores 0.1 GB, and more for checkpoints during training


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    subject, text : str
        What was checked, and what was found.
    state : {"ok", "note", "problem"}
        A problem would stop ``make figures``; a note costs time or limits what can be run.
    fix : str
        What to do about it; empty if nothing.
    """

    subject: str
    state: str
    text: str
    fix: str = ""


def print_findings(console: Console | None = None) -> int:
    """Print what `examine` finds; returns 1 if there is a problem, else 0."""
    console = console or Console(width=None if sys.stdout.isatty() else 100)
    findings = examine()
    table = Table("", "what", "found", box=None, pad_edge=False, header_style="bold")
    for finding in findings:
        fix = f"\nfix: {finding.fix}" if finding.fix else ""
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(state, finding.subject, escape(finding.text + fix))
    console.print(table)
    problems = sum(finding.state == "problem" for finding in findings)
    console.print(f"{problems} problems" if problems else "nothing would stop make figures")
    return int(problems > 0)


def examine() -> list[Finding]:
    """Check everything, or only the packages if one is missing, because the other checks need them."""
    packages = _packages()
    if packages.state == "problem":
        return [packages]
    hub = _hub()
    return [packages, *_checkout(), _kernel(), _encoder(hub), _smollm2(), hub, _data(), *_machine()]


def _packages() -> Finding:
    """Python, and whether all that the notebooks import is installed."""
    python = f"Python {sys.version.split()[0]}"
    try:
        needed = [Requirement(line) for line in metadata.requires("softlms") or ()]
    except metadata.PackageNotFoundError:
        return Finding("packages", "problem", f"{python}; softlms itself is not installed", INSTALL)
    wrong = []
    for requirement in needed:
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": x}) for x in ("workbook", "export")):
            found = _version(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier} ({found or 'missing'})")
    if wrong:
        return Finding("packages", "problem", f"{python}; needed: {', '.join(wrong)}", INSTALL)
    return Finding("packages", "ok", ", ".join([python, *(f"{name} {_version(name)}" for name in SHOWN)]))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _checkout() -> Iterator[Finding]:
    """The checkout: its pinned versions, its folders and the free space."""
    from softlms.workbook.registry import project_root  # it needs packages that `_packages` checks first

    try:
        root = project_root()
    except FileNotFoundError as error:
        yield Finding("checkout", "problem", str(error), "cd into the checkout")
        return
    yield Finding("checkout", "ok", str(root))
    lines = (root / "requirements.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin: _version(pin.name) for pin in pins}
    others = [f"{pin} ({found})" for pin, found in versions.items() if found and not pin.specifier.contains(found)]
    missing = [pin.name for pin, found in versions.items() if found is None]
    text = f"{len(pins) - len(others) - len(missing)} of {len(pins)} as in requirements.txt"
    text += f"; other: {', '.join(others)}" if others else ""
    text += f"; not installed: {', '.join(missing)}" if missing else ""
    unlike = bool(others or missing)
    yield Finding("pinned versions", "note" if unlike else "ok", text, INSTALL if unlike else "")
    yield _writable(root)
    free = shutil.disk_usage(root).free / 1e9
    state, fix = ("ok", "") if free > LEAST_DISK else ("problem", f"free {LEAST_DISK} GB, or move the checkout")
    yield Finding("disk", state, f"{free:.1f} GB free where runs/ is kept", fix)


def _writable(root: Path) -> Finding:
    """Whether the folders of ``make figures``, or their parents, can be written."""
    from softlms.utils.files import check_writable
    from softlms.workbook.registry import Folders

    folders = Folders(root, "quick")
    for folder in (folders.figures, folders.results, folders.executed, folders.runs):
        place = next(place for place in (folder, *folder.parents) if place.exists())
        try:
            check_writable([place])
        except OSError as error:
            return Finding("folders", "problem", str(error), "make it a writable folder")
    return Finding("folders", "ok", "figures/, results/, executed/ and runs/ can be written")


def _kernel() -> Finding:
    """Whether the kernel python3, which every notebook names, starts this Python; a user's kernel may shadow it."""
    from softlms.workbook.process import check_kernel

    try:
        folder, command = check_kernel()
    except ValueError as error:
        text, _, fix = str(error).partition("; ")
        return Finding("kernel python3", "problem", text, fix)
    if Path(command).parent == Path(sys.executable).parent:
        return Finding("kernel python3", "ok", f"starts {sys.executable}")
    text = f"{folder} starts {command}, not {sys.executable}"
    return Finding("kernel python3", "problem", text, f"remove {folder}: this Python brings its own")


def _hub() -> Finding:
    try:
        get_hf_file_metadata(hf_hub_url(NAMED["minilm"].hub, "config.json"), timeout=HUB_SECONDS)
    except Exception as error:  # whatever the reason, the hub cannot be reached now
        text = f"offline ({type(error).__name__}): quick does not need it, other profiles need a folder with data"
        return Finding("hub", "note", text)
    return Finding("hub", "ok", "answers")


def _encoder(hub: Finding) -> Finding:
    encoder = zoo.find_encoder("minilm")
    files = ("config.json", "model.safetensors", "tokenizer.json")
    if Path(encoder.location).is_absolute():
        missing = [file for file in files if not (Path(encoder.location) / file).is_file()]
        if missing:
            text = f"{encoder.source} lacks {', '.join(missing)}"
            return Finding("encoder", "problem", text, INSTALL_ENCODER.replace("install", "install --force-reinstall"))
        return Finding("encoder", "ok", encoder.source)
    if all(isinstance(try_to_load_from_cache(encoder.location, file), str) for file in files):
        return Finding("encoder", "ok", f"{encoder.source}, in the cache")
    if hub.state == "ok":
        return Finding("encoder", "note", f"{encoder.source}: 90 MB at first use", INSTALL_ENCODER)
    return Finding("encoder", "problem", f"{encoder.source}: neither its package nor the hub is there", INSTALL_ENCODER)


def _smollm2() -> Finding:
    """The language model that ``make figures`` does not need."""
    if NAMED["smollm2"].find() is None:
        return Finding("smollm2", "ok", "not installed, and not needed for make figures; make smollm2 brings it")
    try:
        return Finding("smollm2", "ok", zoo.find_encoder("smollm2").source)
    except (ImportError, OSError, ValueError) as error:
        return Finding("smollm2", "note", str(error), "make smollm2, after removing what is damaged")


def _data() -> Finding:
    from softlms.workbook.book import DATA_VARIABLE

    folder = os.environ.get(DATA_VARIABLE, "")
    if not folder or is_hub(folder):
        text = f"{DATA_VARIABLE} is {folder or 'not set'}: quick needs no data, laptop and paper take GLUE from the hub"
        return Finding("data", "ok", text)
    if not Path(folder).expanduser().is_dir():
        return Finding(
            "data", "problem", f"{DATA_VARIABLE} is {folder}: there is no such folder", f"unset {DATA_VARIABLE}"
        )
    if (Path(folder) / "train.tsv").is_file():
        return Finding(
            "data", "ok", f"{DATA_VARIABLE} is {folder}: the files of one task, used for whichever task is asked for"
        )
    here = [name for name in glue.LAYOUTS if _holds(folder, name)]
    fix = "" if here else f"{DATA_VARIABLE}=FOLDER with mrpc/train.tsv, or unset it: laptop and paper would stop"
    text = f"{DATA_VARIABLE} is {folder}: {', '.join(here) or 'no task there'}"
    return Finding("data", "note" if fix else "ok", text, fix)


def _holds(folder: str, task: str) -> bool:
    try:
        glue.find_folder(Path(folder), task)
    except FileNotFoundError:
        return False
    return True


def _machine() -> Iterator[Finding]:
    bf16 = "bfloat16 is fast" if fast_bf16() else "bfloat16 would be emulated: training runs in float32"
    yield Finding("processor", "ok", f"{hardware()}; {bf16}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", f"{cores} to use here; torch takes {torch.get_num_threads()} threads")
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    short = memory.available / 1e9 < LEAST_MEMORY
    fix = "close large programs: two runs are done in parallel" if short else ""
    yield Finding("memory", "note" if short else "ok", text, fix)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: quick and laptop need none"
    yield Finding("GPU", "ok", gpu)

    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    text = f"{compiler or 'none'}: only torch.compile needs one, no notebook does"
    yield Finding("C++ compiler", "ok" if compiler else "note", text, "" if compiler else "install g++")
