"""The documentation keeps step with the code: fields, options, links, paths and examples."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path

import click
import pytest
import tomllib

from rollout_spec.adaptive.checkpoint import CheckpointError
from rollout_spec.adaptive.spot.protocol import SpotError
from rollout_spec.adaptive.trainer import TrainingError
from rollout_spec.cli import COMMANDS, main
from rollout_spec.config import EngineConfig, SpeculationConfig
from rollout_spec.contracts import Completion, RolloutSpecError, SamplingParams, SpecCounts, VersionSpan
from rollout_spec.drafters.guard import DrafterReport
from rollout_spec.engine import EngineStats, RolloutEngine
from rollout_spec.integrations.ray.dispatch import PoolError
from rollout_spec.integrations.trl.compat import UnsupportedTrl
from rollout_spec.integrations.verl.compat import UnsupportedVerl
from rollout_spec.integrations.vllm.compat import UnsupportedVllm
from rollout_spec.integrations.vllm.weights import HalfUpdated
from rollout_spec.observe.report import Check, EvidenceLevel, ExactnessLevel, Machine, Report
from rollout_spec.policy.records import Reason
from rollout_spec.policy.workloads import SYNTHETIC
from rollout_spec.torch_backend.backend import StepTimes
from rollout_spec.torch_backend.weights import UpdateReport

ROOT = Path(__file__).resolve().parents[1]
API, LOSSLESSNESS = ROOT / "docs" / "api.md", ROOT / "docs" / "losslessness.md"
POLICY = ROOT / "docs" / "policy.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
FOLDERS = (
    "rollout_spec",
    "adaptive",
    "integrations",
    "tests",
    "examples",
    "benchmarks",
    "docs",
    "requirements",
)
FENCE = re.compile(r"^(?P<mark><!-- runnable -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.$~])/(work|root|home|tmp|mnt|opt|Users)/|\b[A-Z]:\\",
    "a host": r"https?://(?!github\.com/|arxiv\.org/)|\blocalhost\b|\b\d+\.\d+\.\d+\.\d+\b",
}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text(page))


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def section(page: Path, heading: str) -> str:
    """What stands below a heading, up to the next one."""
    parts = re.split(r"^#+ (.+)$", text(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))[heading]


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without its two heading rows."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def blocks(page: Path) -> list[re.Match[str]]:
    return [match for match in FENCE.finditer(text(page)) if match["language"] == "python"]


@pytest.mark.parametrize(
    "record",
    [
        EngineConfig,
        SpeculationConfig,
        SamplingParams,
        Completion,
        SpecCounts,
        UpdateReport,
        EngineStats,
        StepTimes,
    ],
    ids=lambda record: record.__name__,
)
def test_tables_have_every_field_in_order_with_its_default(record: type) -> None:
    table = rows(section(API, record.__name__))
    fields = dataclasses.fields(record)
    assert [row[0].strip("`") for row in table] == [field.name for field in fields]
    if record not in (EngineConfig, SpeculationConfig, SamplingParams):
        return
    for row, field in zip(table, fields):
        if field.default is not dataclasses.MISSING:
            assert row[1] == f"`{field.default!r}`", field.name
        else:
            assert row[1] == f"`{field.type}()`", field.name


@pytest.mark.parametrize("record", [VersionSpan, DrafterReport], ids=lambda record: record.__name__)
def test_small_records_are_written_as_calls(record: type) -> None:
    call = f"{record.__name__}({', '.join(field.name for field in dataclasses.fields(record))})"
    assert f"`{call}`" in text(API)


def test_the_report_schema_is_described() -> None:
    part = section(API, "The report")
    fields = ["schema_version", *(field.name for field in dataclasses.fields(Report))]
    assert [row[0].strip("`") for row in rows(part)] == fields
    for record in (Check, Machine):
        assert not [f.name for f in dataclasses.fields(record) if f"`{f.name}`" not in part]
    assert not [level.value for level in EvidenceLevel if f"`{level.value}`" not in part]


def test_levels_of_exactness_are_defined() -> None:
    levels = [row[0] for row in rows(section(LOSSLESSNESS, "What is promised"))]
    assert levels == [level.value for level in ExactnessLevel]


def test_reasons_and_synthetic_workloads_are_listed() -> None:
    assert [row[0].strip("`") for row in rows(section(POLICY, "Reasons"))] == [
        reason.value for reason in Reason
    ]
    assert not [name for name in SYNTHETIC if f"`{name}`" not in section(POLICY, "Simulator")]


def test_every_method_of_the_engine_is_described() -> None:
    methods = [name for name in vars(RolloutEngine) if not name.startswith("_")]
    assert {"from_pretrained", "generate", "update_weights"} <= set(methods)
    assert not [name for name in methods if not re.search(rf"`(RolloutEngine\.)?{name}[(`]", prose(API))]


def test_every_error_of_the_package_is_in_the_table() -> None:
    def below(error: type) -> set[str]:
        ours = {cls for cls in error.__subclasses__() if cls.__module__.startswith("rollout_spec.")}
        return {cls.__name__ for cls in ours}.union(*map(below, ours))

    adapters = (UnsupportedVllm, UnsupportedVerl, UnsupportedTrl, PoolError, HalfUpdated)
    adaptive = (CheckpointError, TrainingError, SpotError)
    everything = below(RolloutSpecError) | {e.__name__ for e in (*adapters, *adaptive)}
    assert {row[0].strip("`") for row in rows(section(API, "Errors"))} == everything


def test_every_command_and_option_is_in_the_table() -> None:
    documented = {}
    for name, _, options in rows(section(API, "Command line")):
        documented[re.sub(r"( \[?[A-Z]+\]?)+$", "", name.strip("`").removeprefix("rollout-spec "))] = options
    found = {}
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        group = isinstance(command, click.Group)
        commands = {f"{name} {sub}": c for sub, c in command.commands.items()} if group else {name: command}
        for path, leaf in commands.items():
            options = {
                opt for p in leaf.params if isinstance(p, click.Option) for opt in p.opts if opt[:2] == "--"
            }
            assert "--json" in options
            found[path] = options - {"--json"}
    assert {path: set(re.findall(r"`(--[\w-]+)`", options)) for path, options in documented.items()} == found
    assert not [path for path in found if f"rollout-spec {path}" not in text(ROOT / "README.md")]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page):
        ast.parse(block["code"])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "<!-- runnable -->" in text(page)], ids=lambda p: p.name
)
def test_runnable_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "tests" / "engine" / "conftest.py"
    spec = importlib.util.spec_from_file_location("docs_tiny_policy", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    monkeypatch.chdir(ROOT)
    names = {"__name__": "docs", "model": tiny.make_model(), "tokenizer": tiny.CharTokenizer()}
    for block in blocks(page):
        if block["mark"]:
            line = text(page)[: block.start("code")].count("\n")
            exec(compile("\n" * line + block["code"], page.name, "exec"), names)


def test_something_is_runnable() -> None:
    marked = {page.name: sum(bool(block["mark"]) for block in blocks(page)) for page in PAGES}
    assert marked["README.md"] == 1 and marked["api.md"] >= 8
    assert sum(text(page).count("<!-- runnable -->") for page in PAGES) == sum(marked.values())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(linked)), flags=re.M)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_that_are_named_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[^`\s]*)`", prose(page)):
        assert (ROOT / name).exists(), name


def test_the_tests_that_are_named_exist() -> None:
    named = [
        name
        for row in rows(section(LOSSLESSNESS, "What shows it"))
        for name in re.findall(r"`(tests/[^`]+)`", row[0])
    ]
    assert len(named) > 8 and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_pages_name_no_machine(page: Path, what: str) -> None:
    assert re.findall(FORBIDDEN[what], text(page)) == []


def test_the_readme_fits_and_is_the_packages_own() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= 150
    assert tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["readme"] == "README.md"


def test_the_readmes_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), flags=re.M))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", text(ROOT / "README.md"), flags=re.M))
    assert {"demo", "test", "test-integration", "lint"} <= named <= targets
