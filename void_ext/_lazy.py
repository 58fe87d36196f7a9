"""Packages whose public names are imported from their modules at first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_at_first_use(
    package: str, module_of: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package with an ``__all__``.

    Args:
        package: its ``__name__``.
        module_of: each name's module, as seen from the package.
    """
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in module_of:
            public = ", ".join(namespace["__all__"])
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {public}")
        value = namespace[name] = getattr(import_module(f"{package}.{module_of[name]}"), name)
        return value

    def names() -> list[str]:
        return sorted({*namespace, *namespace["__all__"]})

    return get, names
