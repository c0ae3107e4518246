"""The package's shape: dependencies point one way, imports are cheap, and a wheel holds every folder."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

import rollout_spec
from rollout_spec.commands import doctor

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR = PROJECT["tool"]["setuptools"]["package-dir"]
ENGINES = ("rollout_spec.engine", "rollout_spec.torch_backend", "rollout_spec.vllm_backend")


def modules() -> dict[str, Path]:
    """Every module that is installed, by its import name."""
    found = {}
    for name, folder in PACKAGE_DIR.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """Absolute names of what a file imports, inside functions too; `if TYPE_CHECKING:` does not count."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).strip(".")
            names.update(f"{base}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)
    return names


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offenders(package: str, *forbidden: str) -> list[str]:
    """`module imports name` for every import of `forbidden` in `package`."""
    return [
        f"{module} imports {name}"
        for module, path in modules().items()
        if inside(module, package)
        for name in imports(module, path)
        if inside(name, *forbidden)
    ]


def test_contracts_import_the_standard_library_only() -> None:
    found = imports("rollout_spec.contracts", ROOT / "rollout_spec" / "contracts.py")
    assert {name.split(".")[0] for name in found} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("rollout_spec.policy", ("torch", *ENGINES)),
        ("rollout_spec.config", ("torch", *ENGINES)),
        ("rollout_spec.sampling", ("rollout_spec.models", *ENGINES)),
        ("rollout_spec.models", ("rollout_spec.sampling",)),
        ("rollout_spec.kernels", ("rollout_spec.models", "rollout_spec.drafters", *ENGINES)),
        ("rollout_spec.torch_backend", ("rollout_spec.engine", "rollout_spec.adaptive", "verl", "trl")),
        ("rollout_spec.vllm_backend", ("verl", "trl")),
        ("rollout_spec.adaptive", ("verl", "trl")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dependencies_point_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    assert offenders(package, *forbidden) == []


def test_nothing_imports_integrations_but_itself_and_the_backend_over_vllm() -> None:
    found = offenders("rollout_spec", "rollout_spec.integrations")
    allowed = ("rollout_spec.integrations", "rollout_spec.vllm_backend.", "rollout_spec.benchmarks.vllm ")
    assert [line for line in found if not line.startswith(allowed)] == []
    vllm = [line for line in found if line.startswith("rollout_spec.vllm_backend")]
    assert vllm and all(" imports rollout_spec.integrations.vllm" in line for line in vllm)


def test_import_readers_see_nested_and_relative_imports(tmp_path: Path) -> None:
    file = tmp_path / "here.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import never\n"
        "def f():\n    from ..up import x\n    from . import y\n    import torch.nn\n"
    )
    assert imports("a.b.here", file) == {"typing.TYPE_CHECKING", "a.up.x", "a.b.y", "torch.nn"}


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter that warms no import."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, rollout_spec; from rollout_spec import SamplingParams, EngineConfig, Completion\n"
    assert run_python(code + "print({'torch', 'numpy', 'transformers'} & set(sys.modules))") == "set()\n"


def test_help_imports_no_torch_and_no_command() -> None:
    code = (
        "import sys\nfrom rollout_spec.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('rollout_spec.commands.')])"
    )
    assert run_python(code).endswith("[]\n")


def test_public_names_resolve() -> None:
    for name in rollout_spec.__all__:
        assert getattr(rollout_spec, name).__name__ == name
        assert name in dir(rollout_spec)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = rollout_spec.Engine


def test_every_folder_with_code_is_in_the_package_list() -> None:
    assert {name for name, path in modules().items() if path.name == "__init__.py"} == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )
    without_init = {path.parent for path in modules().values() if not (path.parent / "__init__.py").exists()}
    assert without_init == set()


def test_doctor_and_the_package_ask_for_the_same_releases() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + [
        line for name in ("vllm", "verl", "ray") for line in extras[name]
    ]
    declared = {(r := Requirement(line)).name: r.specifier for line in lines}
    packages = (doctor.TORCH, doctor.TRANSFORMERS, doctor.BITSANDBYTES, doctor.VLLM, doctor.VERL, doctor.RAY)
    for package in packages:
        assert str(declared[package.distributions[0]]) == str(Requirement("x" + package.supported).specifier)


@pytest.mark.parametrize("file", ["light.txt", "full.txt"])
def test_pinned_environments_satisfy_the_package(file: str) -> None:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    pins = {(r := Requirement(line)).name.lower(): r for line in lines if line and line[0] != "#"}
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())
    for line in PROJECT["project"]["dependencies"]:
        wanted = Requirement(line)
        if wanted.name != "torch":  # installed before the pins, by the Makefile
            version = str(pins[wanted.name].specifier).removeprefix("==")
            assert wanted.specifier.contains(version), line


def test_a_wheel_holds_every_module_under_its_import_name(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGE_DIR.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), str(source)], check=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for name, path in modules().items()
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {
        f"rollout_spec/kernels/{path.name}" for path in (ROOT / "rollout_spec/kernels").glob("*.[ch]*")
    }
    assert sources and sources <= names
