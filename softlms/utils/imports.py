"""Register with a library that may be imported later, or never."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["when_imported"]


class _Watcher(MetaPathFinder):
    """Imports modules of ours as soon as a library's module has been imported."""

    def __init__(self, library: str, ours: tuple[str, ...]) -> None:
        self.library, self.ours = library, ours

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.library:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                for ours in self.ours:
                    importlib.import_module(ours)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(library: str, *ours: str) -> None:
    """Import modules of ours, which register themselves, once `library` is imported; now if it already is.

    Parameters
    ----------
    library, *ours : str
        Full module names. A library is given once, with all of ours.
    """
    if library in sys.modules:
        for name in ours:
            importlib.import_module(name)
    else:
        sys.meta_path.insert(0, _Watcher(library, ours))
