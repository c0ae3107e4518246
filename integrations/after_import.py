"""Changing a module of somebody else's once they import it themselves, so that a process which never does pays nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Touch = Callable[[ModuleType], None]


class _AfterImport(MetaPathFinder):
    """Runs touches right after a module was imported."""

    def __init__(self) -> None:
        self.touches: dict[str, list[Touch]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.touches:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_touch(module: ModuleType) -> None:
            execute(module)
            for touch in self.touches.pop(fullname, []):
                touch(module)

        spec.loader.exec_module = execute_and_touch  # type: ignore[method-assign]
        return spec


_after_import = _AfterImport()
_done: set[tuple[str, Touch]] = set()


def after_import(name: str, touch: Touch) -> None:
    """Call `touch(module)` once in this process: now if the module called `name` is imported, else when it is."""
    if (name, touch) in _done:
        return
    _done.add((name, touch))
    if name in sys.modules:
        touch(sys.modules[name])
        return
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    _after_import.touches.setdefault(name, []).append(touch)
