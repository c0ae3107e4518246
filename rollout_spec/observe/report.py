"""What a command found: one schema for every `--json` file, with machine, versions, seed and evidence level.

A report says how its figures came about before it says what they are; a failed check fails the command.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout_spec.contracts import RolloutSpecError
from rollout_spec.observe.machine import cpu_model, git_commit, installed_versions

SCHEMA_VERSION = 1


class ReportError(RolloutSpecError, ValueError):
    """A report that does not fit the schema; the message names the field."""


class EvidenceLevel(str, Enum):
    """What kind of evidence stands behind a figure."""

    L0 = "L0"
    L1 = "L1"
    L2 = "L2"
    L3 = "L3"
    L4 = "L4"

    @property
    def meaning(self) -> str:
        """One line to print beside a figure."""
        return _EVIDENCE[self.value]


class ExactnessLevel(str, Enum):
    """How exact speculative sampling is for one model, backend and device."""

    E0 = "E0"
    E1 = "E1"
    E2 = "E2"

    @property
    def meaning(self) -> str:
        """One line to print beside a verdict."""
        return _EXACTNESS[self.value]


_EVIDENCE = {
    "L0": "enumeration or proof",
    "L1": "CPU, real policy",
    "L2": "GPU timings at real shapes and vocabularies with injected acceptance",
    "L3": "simulator predictions, written down before the measurement they are compared with",
    "L4": "a third party's real model, by the JSON their run produced",
}
_EXACTNESS = {
    "E0": "lossless in distribution, given the logits the device computes",
    "E1": "same noise: trajectories with and without speculation part only where two scores nearly tie",
    "E2": "trajectories are bitwise the same with and without speculation",
}


@dataclass(frozen=True)
class Check:
    """One thing that had to hold: `value` was found, `target` (in words) was asked for."""

    name: str
    value: float | int | str | bool | None
    target: str
    passed: bool


@dataclass(frozen=True)
class Machine:
    """Where a report was made. `threads` is what torch uses; `memory_gib` is the installed memory."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    memory_gib: float
    gpus: tuple[str, ...]

    @classmethod
    def here(cls) -> Machine:
        """This machine. Imports torch."""
        import torch

        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        model, features = cpu_model()
        return cls(
            cpu=model,
            features=features,
            cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
            gpus=tuple(gpus),
        )


@dataclass(frozen=True)
class Report:
    """The outcome of one command.

    Attributes:
        command: The command's name.
        results: What was measured, JSON values by name (no NaN: say None).
        checks: What had to hold.
        evidence_level: What kind of evidence the figures are; None for a report without figures.
        seed: Seed of everything random in it; None if nothing was.
        machine, versions, commit: Where it was made, and with what.
        command_line: How to make it again.
        created: UTC time, ISO 8601.
    """

    command: str
    results: Mapping[str, Any]
    checks: Sequence[Check] = ()
    evidence_level: EvidenceLevel | None = None
    seed: int | None = None
    machine: Machine = field(default_factory=Machine.here)
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    commit: str | None = field(default_factory=git_commit)
    command_line: str = field(default_factory=lambda: shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not self.command:
            raise ReportError("command: name the command that made the report")
        for name in ("python", "rollout-spec", "torch"):
            if name not in self.versions:
                raise ReportError(
                    f"versions: {name} is missing; a figure without versions cannot be compared"
                )
        for index, check in enumerate(self.checks):
            if not check.name or not check.target or not isinstance(check.passed, bool):
                raise ReportError(
                    f"checks[{index}]: needs a name, a target and passed=True or False: {check}"
                )
            _require_json(f"checks[{index}].value", check.value)
        _require_json("results", self.results)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to the JSON file."""
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Read what `to_dict` wrote. Raises `ReportError` naming what is missing, unknown or wrong."""
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ReportError(
                f"schema_version={values.get('schema_version')!r}: this package reads {SCHEMA_VERSION}"
            )
        content = {name: value for name, value in values.items() if name != "schema_version"}
        _require_fields(cls, content, "")
        level = content["evidence_level"]
        try:
            content["evidence_level"] = None if level is None else EvidenceLevel(level)
        except ValueError:
            known = ", ".join(known.value for known in EvidenceLevel)
            raise ReportError(f"evidence_level={level!r}: use one of {known}, or null") from None
        for index, check in enumerate(content["checks"]):
            _require_fields(Check, check, f"checks[{index}].")
        content["checks"] = [Check(**check) for check in content["checks"]]
        machine = content["machine"]
        _require_fields(Machine, machine, "machine.")
        content["machine"] = Machine(
            **{**machine, "features": tuple(machine["features"]), "gpus": tuple(machine["gpus"])}
        )
        return cls(**content)

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a JSON file back, validated."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise ReportError(f"{path}: not a report ({error})") from error


def _require_fields(cls: type, values: object, prefix: str) -> None:
    if not isinstance(values, Mapping):
        raise ReportError(f"{prefix.rstrip('.') or 'report'}: not a JSON object")
    known = [f.name for f in fields(cls)]
    for name in known:
        if name not in values:
            raise ReportError(f"{prefix}{name}: missing")
    for name in values:
        if name not in known:
            raise ReportError(f"{prefix}{name}: unknown; known here: {', '.join(known)}")


def _require_json(where: str, value: object) -> None:
    """Raise unless `value` is made of finite numbers, strings, lists and objects with string keys."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ReportError(f"{where}: key {key!r} is not a string")
            _require_json(f"{where}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_json(f"{where}[{index}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ReportError(f"{where}={value}: JSON has no such number; write None")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ReportError(
            f"{where}: {type(value).__name__} is not a JSON value; convert it (.item(), .tolist())"
        )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _writable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Find out before the work starts, not after it, that the file cannot be written."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"{path.parent} is not a folder that can be written to")
    return path


def report_options(function: _Function) -> _Function:
    """Give a click command `--json FILE`, passed as `json_path`."""
    return click.option(
        "--json",
        "json_path",
        metavar="FILE",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        callback=_writable,
        help="Write the report, with machine and versions, to FILE.",
    )(function)


def checks_table(checks: Sequence[Check]) -> Table:
    """Checks as a rich table, failures in red."""
    table = Table("check", "found", "asked for", "", box=None, header_style="bold", pad_edge=False)
    for check in checks:
        value = f"{check.value:.4g}" if isinstance(check.value, float) else str(check.value)
        verdict = "[green]ok" if check.passed else "[bold red]FAILED"
        table.add_row(escape(check.name), escape(value), escape(check.target), verdict)
    return table


def finish(
    report: Report, json_path: Path | None, console: Console | None = None, show_checks: bool = True
) -> None:
    """End a command: print the checks, write the file, and exit with 1 if a check failed."""
    console = console or Console()
    if report.checks and show_checks:
        console.print()
        console.print(checks_table(report.checks))
    if report.evidence_level is not None:
        console.print(
            f"\nevidence {report.evidence_level.value}: {report.evidence_level.meaning}", style="dim"
        )
    if json_path is not None:
        report.write(json_path)
        console.print(f"report written to {json_path}", style="dim", highlight=False)
    if not report.passed:
        sys.exit(1)
