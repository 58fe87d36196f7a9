"""Which layers of a language model did nothing, from the L2 norms of its residual stream."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from void_ext.errors import LibraryError
    from void_ext.ops import add_l2norm, add_rms_norm, exit_select, row_l2norm, void_mask
    from void_ext.patch import patch, unpatch
    from void_ext.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "LibraryError",
    "Trace",
    "add_l2norm",
    "add_rms_norm",
    "exit_select",
    "patch",
    "row_l2norm",
    "unpatch",
    "void_mask",
]

# A public name is imported from its module at first use, so that `import void_ext` costs next to nothing.
_MODULE_OF = {
    "LibraryError": "void_ext.errors",
    "Trace": "void_ext.trace",
    "add_l2norm": "void_ext.ops",
    "add_rms_norm": "void_ext.ops",
    "exit_select": "void_ext.ops",
    "row_l2norm": "void_ext.ops",
    "unpatch": "void_ext.patch",
    "void_mask": "void_ext.ops",
}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`void_ext.patch` is the function whether or not the subpackage of that name was imported before.

    Importing a submodule sets it on its parent; a property with a setter that drops it keeps the function in place.
    """

    @property
    def patch(self) -> Any:
        return import_module("void_ext.patch").patch

    @patch.setter
    def patch(self, submodule: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
