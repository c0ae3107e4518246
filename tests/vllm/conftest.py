"""Shared by the tests of the vLLM plugin: small engines in this process, and the sources of released vLLMs."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})

POLICY = str(Path(__file__).parents[2] / "examples" / "arithmetic" / "policy")
SMALL: dict[str, Any] = {
    "model": POLICY,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 << 20,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "seed": 0,
}

sys.path.insert(0, str(Path(__file__).parent))  # the helpers that tests share

SOURCES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rollout-spec" / "vllm-sources"


@pytest.fixture(scope="session")
def released_vllm() -> Callable[[str], Path]:
    """`released_vllm("0.33.0")`: a folder with the Python files of that release, from the wheel pip finds.

    A wheel is some 300 MB; only its Python files are kept, in the user's cache, for the next run.
    """
    return fetch_release


def fetch_release(version: str) -> Path:
    folder = SOURCES / version
    if folder.is_dir():
        return folder
    SOURCES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SOURCES) as scratch:
        # The wheel of one platform everywhere: the files read are the same in all, and none is run from it.
        command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps", "--no-cache-dir"]
        command += ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        if done.returncode:
            pytest.fail(
                f"pip could not download vllm=={version}, whose sources this test reads:\n{done.stderr[-2000:]}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / version
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    archive.extract(name, unpacked)
        shutil.move(unpacked, folder)
    return folder


# --- engines -----------------------------------------------------------------------------------------------------


class Engine:
    """A small vLLM in this process: greedy or seeded generation from token ids, and a way to its parts."""

    def __init__(self, **options: Any) -> None:
        from vllm import LLM

        self.llm: Any = LLM(**(SMALL | options))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int] = 48, **params: Any
    ) -> list[list[int]]:
        """Output token ids of each prompt; greedy unless `params` say otherwise."""
        return [list(output.outputs[0].token_ids) for output in self.run(prompts, max_tokens, **params)]

    def run(
        self, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int] = 48, **params: Any
    ) -> list[Any]:
        """The same as vLLM's request outputs."""
        from vllm import SamplingParams

        lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        params = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | params
        return self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [SamplingParams(max_tokens=length, **params) for length in lengths],
            use_tqdm=False,
        )

    @property
    def config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def drafter(self) -> Any:
        return self.runner.drafter

    def counters(self) -> tuple[int, int]:
        """Draft tokens verified and accepted since start."""
        found = {metric.name: metric for metric in self.llm.get_metrics()}
        names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
        return tuple(int(found[name].value) if name in found else 0 for name in names)  # type: ignore[return-value]

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()


class Engines:
    """One engine at a time: an old one that dies late takes the process groups of the new one with it."""

    def __init__(self) -> None:
        self._options: dict[str, Any] | None = None
        self._engine: Engine | None = None

    def __call__(self, **options: Any) -> Engine:
        """An engine of these options over `SMALL`: the one that runs if it has them, else a new one."""
        if self._engine is None or self._options != options:
            self.close()
            self._engine, self._options = Engine(**options), options
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._options = None


@pytest.fixture(scope="session")
def policy_path() -> str:
    """The shipped policy, a trained Qwen3 of 4 layers."""
    return POLICY


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """`engines(**arguments of vllm.LLM)`, on the shipped policy in float32 unless said otherwise."""
    made = Engines()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path_factory.getbasetemp() / "rollout-spec"))


def changed(config: Any, **fields: Any) -> Any:
    """A configuration with other values in some (dotted) fields; what it derives from them is not derived again."""
    inner: dict[str, dict[str, Any]] = {}
    own = {}
    for name, value in fields.items():
        part, _, field = name.partition("__")
        if field:
            inner.setdefault(part, {})[field] = value
        else:
            own[part] = value
    own |= {part: changed(getattr(config, part), **given) for part, given in inner.items()}
    return Changed(config, own)


class Changed:
    def __init__(self, config: Any, own: dict[str, Any]) -> None:
        self._config, self._own = config, own

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_own"]
        return own[name] if name in own else getattr(self.__dict__["_config"], name)


def prompts(count: int, length: int = 20) -> list[list[int]]:
    """Token ids without meaning, all different."""
    return [[(5 * i + 3 * x + x * x % 7) % 120 + 4 for x in range(length)] for i in range(count)]


def run_apart(script: str, given: Any, folder: Path, **environment: str) -> Any:
    """Run a script in a process of its own: `given` on stdin and what it prints behind `RESULT` back, both JSON."""
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)],
        input=json.dumps(given),
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            return json.loads(line.removeprefix("RESULT"))
    return pytest.fail(f"the script ended with {done.returncode}:\n{done.stderr[-3000:]}")
