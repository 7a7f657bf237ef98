"""The built-in methods, and `register` for those of other packages."""

from __future__ import annotations

import importlib

from softlms.methods.base import Method
from softlms.modules import Replacement

__all__ = ["forms", "methods", "register"]

BUILT_IN = (  # each has METHODS
    "softlms.methods.static",
    "softlms.methods.masks",
    "softlms.methods.soft",
    "softlms.methods.embeddings",
    "softlms.methods.lora_xs.recovery",
    "softlms.methods.shared_decoder",
    "softlms.methods.early_exit",
    "softlms.methods.depth",
    "softlms.methods.sparse_activations",
    "softlms.methods.dynamic_moe",
)

_registered: dict[str, Method] = {}


def register(*new: Method) -> None:
    """Register methods for chains, tables, saving and loading.

    Parameters
    ----------
    *new : Method

    Raises
    ------
    ValueError
        Another method has the same name, or another class has the same form as one of its modules.
    """
    for method in new:
        if _registered.get(method.name, method) != method:
            raise ValueError(f"There is already a method {method.name!r}: give the new one another name.")
        known = {module.form: module for other in _registered.values() for module in other.modules}
        for module in method.modules:
            if known.get(module.form, module) is not module:
                raise ValueError(f"There is already a form {module.form!r}: give {module.__name__} another one.")
    _registered.update({method.name: method for method in new})


def methods() -> dict[str, Method]:
    """All methods by name."""
    for name in BUILT_IN:
        register(*importlib.import_module(name).METHODS)
    return dict(_registered)


def forms() -> dict[str, type[Replacement]]:
    """The classes that methods put into models, by their form."""
    return {module.form: module for method in methods().values() for module in method.modules}
