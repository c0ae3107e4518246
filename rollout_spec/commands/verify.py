"""`rollout-spec verify`: the proof of exactness, on the user's own model and machine."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from rollout_spec.config import BACKENDS, DRAFTERS
from rollout_spec.contracts import RolloutSpecError, invalid
from rollout_spec.observe.report import ExactnessLevel, Report, finish, report_options

if TYPE_CHECKING:
    from rollout_spec.engine import RolloutEngine

LONGEST_SUM = 12  # terms of a default prompt


def read_prompts(path: Path) -> list[str | list[int]]:
    """Prompts of a file: one per line of text, or per line of JSON.

    A JSON line is a string, a list of token ids, or an object with `prompt` or `prompt_token_ids`.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise invalid("--prompts", str(path), "the file holds no prompt; give one per line")
    if path.suffix != ".jsonl":
        return list(lines)
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            raise invalid("--prompts", f"{path}:{number}", f"not JSON ({error})") from error
        if isinstance(value, dict):
            value = value.get("prompt", value.get("prompt_token_ids"))
        if not isinstance(value, (str, list)) or not value:
            remedy = "give a string, a list of token ids, or an object with `prompt` or `prompt_token_ids`"
            raise invalid("--prompts", f"{path}:{number}", remedy)
        prompts.append(value)
    return prompts


def default_prompts(count: int, vocab_size: int | None, seed: int = 0) -> list[str | list[int]]:
    """Sums to work out; random token ids for a model without a tokenizer, whose `vocab_size` is then given."""
    rng = random.Random(seed)
    lengths = [2 + row % (LONGEST_SUM - 1) for row in range(count)]
    if vocab_size is not None:
        return [[rng.randrange(vocab_size) for _ in range(3 * length)] for length in lengths]
    return ["+".join(str(rng.randint(1, 20)) for _ in range(length)) + "=" for length in lengths]


def tokenized(engine: RolloutEngine, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of every prompt."""
    if engine.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise invalid("--prompts", "text", "this model has no tokenizer; give token ids in a .jsonl file")
    return [
        list(engine.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt  # type: ignore[misc]
        for prompt in prompts
    ]


def look_into_vllm() -> dict[str, Any]:
    """Options with which a proof can see and steer vLLM: in this process, without compiled passes."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return {"vllm": {"enforce_eager": True}}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(BACKENDS), default="torch", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True
)
@click.option(
    "--drafter",
    type=click.Choice([kind for kind in DRAFTERS if kind != "none"]),
    default="auto",
    show_default=True,
    help="auto times the kinds on this machine.",
)
@click.option(
    "--prompts",
    "prompts_path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt per line (.txt), or one JSON value per line (.jsonl); default: sums to work out.",
)
@click.option("--requests", type=click.IntRange(1, 4096), help="Prompts to use; default 8, or all of FILE.")
@click.option("--max-tokens", type=click.IntRange(32), default=128, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Samples per prompt.")
@click.option(
    "--samples",
    type=click.IntRange(500, 65536),
    default=2000,
    show_default=True,
    help="Short completions per test of the distribution.",
)
@report_options
def command(
    model: Path,
    backend: str,
    device: str,
    dtype: str,
    drafter: str,
    prompts_path: Path | None,
    requests: int | None,
    max_tokens: int,
    seeds: int,
    samples: int,
    json_path: Path | None,
) -> None:
    """Prove on MODEL (a folder), here, that speculation changes nothing but time."""
    if backend == "vllm" and find_spec("vllm") is None:
        raise invalid("--backend", backend, "vLLM is not installed: pip install 'rollout-spec[vllm]'")
    given = None if prompts_path is None else read_prompts(prompts_path)
    if given is not None and requests is not None and requests > len(given):
        raise invalid("--requests", requests, f"{prompts_path} holds {len(given)} prompts; ask for fewer")

    from rollout_spec.engine import RolloutEngine
    from rollout_spec.models.checkpoint import read_checkpoint
    from rollout_spec.proofs.prove import Proof, Settings

    console = Console()
    with console.status("loading") as status:
        speculation = {"drafter": drafter, "verifier": "coupled", "canary_min_acceptance": 0.0}
        options: dict[str, Any] = {
            "backend": backend,
            "device": device,
            "dtype": dtype,
            "speculation": speculation,
        }
        if backend == "vllm":
            options |= look_into_vllm()
        engine = RolloutEngine.from_pretrained(model, **options)
        vocab = engine.backend.spec.vocab_size if engine.tokenizer is None else None
        texts = default_prompts(requests or 8, vocab) if given is None else given[:requests]
        settings = Settings(tokenized(engine, texts), seeds, max_tokens, samples)
        used = engine.backend.weights.drafter
        if used is None:
            raise RolloutSpecError(f"--drafter {drafter}: gives no drafter here; name another kind")
        verdict = Proof(engine, settings, lambda: read_checkpoint(model), status.update).run()

    built = engine.backend
    about = {
        "model": model.name,
        "architecture": built.spec.architecture,
        "shape": built.spec.shape_key,
        "backend": backend,
        "device": str(built.device),
        "dtype": str(built.dtype).removeprefix("torch."),
        "drafter": used.name,
        "row_invariant": built.row_invariant,
    }
    level = verdict.level
    settings_used = asdict(settings) | {"prompts": len(settings.prompts)}
    results = about | {
        "exactness": None if level is None else level.value,
        "settings": settings_used,
        "found": verdict.results,
    }
    report = Report("verify", results, verdict.checks, seed=settings.seed)
    print_verdict(console, about, level, report)
    finish(report, json_path, console)


def print_verdict(
    console: Console, about: dict[str, Any], level: ExactnessLevel | None, report: Report
) -> None:
    """What was verified, and the verdict in one line each; the checks follow."""
    what = f"{about['model']} ({about['architecture']}, {about['shape']})"
    how = f"{about['backend']} backend, {about['device']}, {about['dtype']}, drafter {about['drafter']}"
    console.print(f"[bold]{escape(what)}[/]\n{escape(how)}", highlight=False)
    if level is None:
        console.print("\n[bold red]not exact[/]: no level was shown", highlight=False)
        return
    style = "bold green" if report.passed else "bold yellow"
    console.print(f"\nexactness shown: [{style}]{level.value}[/], {level.meaning}", highlight=False)
    if not report.passed:
        failed = sum(not check.passed for check in report.checks)
        console.print(f"[bold red]{failed} checks failed[/]", highlight=False)
