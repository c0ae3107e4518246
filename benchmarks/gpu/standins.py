"""Lets `rollout_spec` import on a machine that lacks what only its command line, or only its speed, needs."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_NAMES = {
    "click": (),
    "numba": (),
    "psutil": (),
    "rich": (),
    "rich.console": ("Console",),
    "rich.markup": ("escape",),
    "rich.table": ("Table",),
}


def stand_in_for_missing() -> list[str]:
    """Put empty modules in the place of click, numba, psutil and rich where they are missing; returns which were.

    `rollout_spec.observe.report`, which the engine imports too, needs them by name. The report's schema, its
    validation and its JSON are then the project's own; only printing to a terminal is not there. Without Numba the automatic
    policy decides as it would, but its loops are not compiled.
    """
    missing = [name for name in ("click", "numba", "psutil", "rich") if not _is_there(name)]
    for name, attributes in _NAMES.items():
        if name.partition(".")[0] in missing:
            module: Any = ModuleType(name, "stand-in: not installed on this machine")
            for attribute in attributes:
                setattr(module, attribute, None)
            sys.modules[name] = module
    if "numba" in missing:
        sys.modules["numba"].njit = lambda **_: lambda function: function  # type: ignore[attr-defined]
    if "psutil" in missing:
        psutil: Any = sys.modules["psutil"]
        psutil.cpu_count = lambda logical=True: os.cpu_count()
        psutil.virtual_memory = _Memory
    return missing


def _is_there(name: str) -> bool:
    return bool(sys.modules.get(name)) or importlib.util.find_spec(name) is not None


class _Memory:
    def __init__(self) -> None:
        self.total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
