"""One package per stage of the method."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return a module-level `__getattr__` (PEP 562) that imports exported names on first access.

    Importing one light module of a stage then does not load its task, Lightning and torch.

    Args:
        package: The package that exports.
        modules: Module of each exported name, relative to the package.
    """

    def __getattr__(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        return value

    return __getattr__
