"""A few arithmetic problems as verl's data files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ARITHMETIC = Path(__file__).parents[2] / "examples" / "arithmetic"


def write_problems(folder: Path) -> None:
    sys.path.insert(0, str(ARITHMETIC))
    try:
        spec = importlib.util.spec_from_file_location("arithmetic_parquet", ARITHMETIC / "parquet.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ARITHMETIC))
    module.write(folder / "train.parquet", 64, 0, "train")
    module.write(folder / "test.parquet", 8, 0, "test")
