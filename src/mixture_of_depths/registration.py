"""Registers the model with transformers' Auto classes as soon as they are there, without loading them for that.

A configuration and a model register themselves where they are defined. What is here has those modules loaded
right after the Auto classes' own, so that whoever imports the package can use them, and the command line answers at
once.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

OWN = {
    "transformers.models.auto.configuration_auto": "mixture_of_depths.model.configuration",
    "transformers.models.auto.modeling_auto": "mixture_of_depths.model.modeling",
}


class AfterImport(MetaPathFinder):
    """Has our module loaded after each of the Auto classes'."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual place of a module in `OWN`, with a loader that loads ours next; None for all others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in OWN else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_both(module: ModuleType) -> None:
            load(module)
            import_module(OWN[fullname])

        loader.exec_module = load_both
        return spec


def register_with_transformers() -> None:
    """Registers now what can be, and the rest when transformers' own is loaded."""
    sys.meta_path.insert(0, AfterImport())
    for library, own in OWN.items():
        if library in sys.modules:
            import_module(own)
