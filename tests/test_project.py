"""The files that describe the project agree with each other."""

import re
import tomllib
from pathlib import Path

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
    return [*PYPROJECT["project"]["dependencies"], *extras["notebooks"], *extras["test"]]


def test_environment_installs_what_pyproject_names():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, pip_section = environment["dependencies"]
    assert python == f"python{PYPROJECT['project']['requires-python']}" and pip == "pip"
    assert pip_section["pip"] == ["-c requirements.txt", "-e .[notebooks,test]"]
    assert set(PYPROJECT["project"]["optional-dependencies"]) == {"notebooks", "test"}


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
