"""What the plugin relies on in vLLM, compared with a vLLM source tree without importing it.

`touches.py` holds the table. The tests compare it with released sources; at start the plugin compares the touches of
the parts in use with the vLLM that is installed, and refuses by name what does not fit.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from rollout_spec.contracts import RolloutSpecError

Form: TypeAlias = "str | tuple[str, ...]"
"""Of a callable its parameters, `"self, x, y=, *, z="`; a closing `...` lets others follow that have defaults, which
is enough for what is called and not overridden. Of a class or module the names that it must define."""


@dataclass(frozen=True)
class Touch:
    """One thing in vLLM that the plugin calls, overrides, reads or rebinds.

    Attributes:
        at: `module:symbol`, or `module:` for the module itself; several where releases moved it, the first found counts.
        forms: What the plugin can deal with.
        why: What the plugin does with it.
        part: The part of the plugin that cannot work without it, one of `touches.PARTS`.
        unfit_in: Releases known to lack it or to have it otherwise, in which `part` is refused.
    """

    at: tuple[str, ...]
    forms: tuple[Form, ...]
    why: str
    part: str
    unfit_in: tuple[str, ...] = ()


def touch(
    part: str, at: str | tuple[str, ...], *forms: Form, why: str, unfit_in: tuple[str, ...] = ()
) -> Touch:
    """A row of the table."""
    return Touch((at,) if isinstance(at, str) else at, forms, why, part, unfit_in)


class Source:
    """The Python files of one vLLM, read and never imported.

    Args:
        folder: The folder that holds the package `vllm`.
        version: Its release, for messages.
    """

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        self.version = version
        self._module = lru_cache(maxsize=None)(self._parse)

    @classmethod
    def installed(cls, version: str) -> Source:
        """The vLLM that `import vllm` would find."""
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise RolloutSpecError("no vLLM is installed")
        return cls(Path(spec.submodule_search_locations[0]).parent, version)

    def difference(self, touch: Touch) -> str | None:
        """How the touch does not fit, old and new named, or None if it fits."""
        found = [(at, form) for at in touch.at if (form := self.form(at, touch.forms[0])) is not None]
        expected = " or ".join(_text(form) for form in touch.forms)
        if not found:
            return f"vLLM {self.version}: {' and '.join(touch.at)} is gone; the plugin needs {expected}, {touch.why}"
        at, actual = found[0]
        if any(_fits(form, actual) for form in touch.forms):
            return None
        if isinstance(actual, tuple):
            lacking = min(
                (sorted(set(form) - set(actual)) for form in touch.forms), key=lambda names: len(names)
            )
            return f"vLLM {self.version}: {at} lacks {', '.join(lacking)}, {touch.why}"
        return f"vLLM {self.version}: {at} is {_text(actual)}; the plugin needs {expected}, {touch.why}"

    def form(self, at: str, like: Form = "") -> Form | None:
        """What stands at `module:symbol`, None if nothing does.

        Of a class it is its names where `like` is a tuple, and the parameters of its constructor where it is text.
        """
        module, _, symbol = at.partition(":")
        node: ast.AST | None = self._module(module)
        for name in filter(None, symbol.split(".")):
            node = None if node is None else _definition(node, name)
        if node is None:
            return None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return _parameters(node.args)
        if isinstance(like, str) and isinstance(node, ast.ClassDef):
            init = _definition(node, "__init__")
            return _parameters(init.args) if isinstance(init, ast.FunctionDef) else None
        return tuple(sorted(set(_names(node))))

    def _parse(self, module: str) -> ast.Module | None:
        path = self.folder.joinpath(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return ast.parse(candidate.read_text(encoding="utf-8"))
        return None


def unmet(source: Source, touches: Iterable[Touch]) -> dict[str, list[str]]:
    """Differences by part; a part that is not named fits."""
    found: dict[str, list[str]] = {}
    for touch in touches:
        if difference := source.difference(touch):
            found.setdefault(touch.part, []).append(difference)
    return found


def require(source: Source, touches: Iterable[Touch], parts: Iterable[str]) -> None:
    """Refuse a vLLM in which one of `parts` cannot work.

    Takes up to 0.8 s where all parts are asked for.

    Raises:
        RolloutSpecError: Names the parts, and what of vLLM does not fit.
    """
    wanted = set(parts)
    differences = unmet(source, [touch for touch in touches if touch.part in wanted])
    if differences:
        lines = [f"{part}: {line}" for part, lines in differences.items() for line in lines]
        raise RolloutSpecError(
            f"vLLM {source.version} does not fit this rollout-spec; leave these parts out, or install a vLLM named in"
            " docs/vllm-versions.md:\n  " + "\n  ".join(lines)
        )


def _definition(node: ast.AST, name: str) -> ast.AST | None:
    """The class or function that a body defines last, wherever branches put it."""
    found: ast.AST | None = None
    for child in _statements(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name == name:
            found = child
    return found


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a body and of its `if`, `try` and `with`, not those inside functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _statements(child)


def _names(node: ast.AST) -> Iterator[str]:
    """What a module or class defines: definitions, imports, assignments, and `self.x` of a class's methods."""
    for child in _statements(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child.name
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            for target in targets:
                yield from (x.id for x in ast.walk(target) if isinstance(x, ast.Name))
    if isinstance(node, ast.ClassDef):
        for inner in ast.walk(node):
            match inner:
                case ast.Attribute(ast.Name("self"), name, ast.Store()):
                    yield name


def _parameters(arguments: ast.arguments) -> str:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parts = [x.arg if i < required else f"{x.arg}=" for i, x in enumerate(positional)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [
        x.arg if d is None else f"{x.arg}=" for x, d in zip(arguments.kwonlyargs, arguments.kw_defaults)
    ]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


def _fits(form: Form, actual: Form) -> bool:
    if isinstance(form, tuple) or isinstance(actual, tuple):
        return isinstance(form, tuple) and isinstance(actual, tuple) and set(form) <= set(actual)
    if not form.endswith("..."):
        return form == actual
    wanted = [part.rstrip("=") for part in form.split(", ")[:-1]]
    leading, _, keywords = ", ".join(wanted).partition("*, ")
    positional = [part for part in leading.split(", ") if part]
    given = actual.split(", ") if actual else []
    if [part.rstrip("=") for part in given[: len(positional)]] != positional:
        return False
    named = {part.rstrip("=") for part in given}
    return set(filter(None, keywords.split(", "))) <= named and all(
        part.endswith("=") or part.startswith("*") or part in {*wanted, "/"} for part in given
    )


def _text(form: Form) -> str:
    return f"({form})" if isinstance(form, str) else "{" + ", ".join(form) + "}"
