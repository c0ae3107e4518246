"""`rollout-spec drafter`: train an EAGLE-style drafter of a policy from its own rollouts, evaluate it, export it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from rollout_spec.adaptive.acceptance import Acceptance, measure
from rollout_spec.adaptive.checkpoint import Checkpointer, read_checkpoint
from rollout_spec.adaptive.export import LAYOUTS, export
from rollout_spec.adaptive.features import episodes_of
from rollout_spec.adaptive.losses import EAGLE_TV, Objective
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.offline import (
    CurvePoint,
    Trained,
    decode,
    drafting_only,
    new_trainer,
    roll_out,
    train,
)
from rollout_spec.adaptive.packing import EpisodeBatches
from rollout_spec.adaptive.trainer import StepMetrics, TrainConfig
from rollout_spec.adaptive.vocabulary import choose_draft_tokens, token_counts
from rollout_spec.contracts import SamplingParams, invalid
from rollout_spec.drafters.eagle_spec import KINDS, EagleSpec
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import load_problems
from rollout_spec.observe.machine import BF16_FEATURES, cpu_model
from rollout_spec.observe.report import EvidenceLevel, Report, finish, report_options

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_TV = Objective(kl=0.1, tv=1.0)
_OBJECTIVES: dict[str, tuple[Objective, Objective | None]] = {
    "kl": (Objective(), None),
    "kl-tv": (Objective(), _TV),
    "tv": (_TV, None),
    "eagle": (Objective(feature=1.0, kl=0.1), None),
    "eagle-tv": (replace(EAGLE_TV, kl=0.3), EAGLE_TV),
}
_RATES = {"layer": 7e-4, "random": 3e-3}


@click.group()
def command() -> None:
    """A one-layer drafter for a policy, trained before any trainer runs."""


@command.command("train")
@click.argument("model", type=_FOLDER)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoints.")
@click.option("--prompts", type=_FILE, help="One per line; default: the arithmetic example's.")
@click.option("--count", type=click.IntRange(2), default=6000, show_default=True, help="Most prompts used.")
@click.option("--n", type=click.IntRange(1), default=1, show_default=True, help="Samples per prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--kind", type=click.Choice(KINDS), default="eagle", show_default=True)
@click.option(
    "--coverage", type=float, help="Reduce the draft vocabulary to this share of sampled tokens (eagle3)."
)
@click.option(
    "--start",
    type=click.Choice(tuple(_RATES)),
    help="The target's last layer (default of 'eagle'), or random weights (of 'eagle3').",
)
@click.option(
    "--objective",
    type=click.Choice(tuple(_OBJECTIVES)),
    help="Default: 'eagle-tv' for the target's last layer, else 'kl'.",
)
@click.option("--steps", type=click.IntRange(1), default=1600, show_default=True, help="Micro-batches.")
@click.option("--minutes", type=float, help="Stop training after this, too.")
@click.option("--batch-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--learning-rate", type=float, help="Default: 0.0007 for the target's last layer, else 0.003.")
@click.option(
    "--draft-length",
    type=click.IntRange(1, 64),
    default=5,
    show_default=True,
    help="K that acceptance is measured at.",
)
@click.option(
    "--unroll",
    type=click.IntRange(1),
    help="Steps on its own states in training; default: 3 for the target's last layer, else --draft-length.",
)
@click.option(
    "--first-unroll",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of the first steps; it rises.",
)
@click.option(
    "--decoded",
    type=click.IntRange(0),
    default=400,
    show_default=True,
    help="New prompts decoded with the drafter at the end, to count what is accepted.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; default: torch's own.")
@click.option("--png", type=_FILE, help="Draw loss and acceptance here; needs matplotlib.")
@report_options
def train_command(
    model: Path,
    out: Path,
    prompts: Path | None,
    count: int,
    n: int,
    max_tokens: int,
    kind: Any,
    coverage: float | None,
    start: str | None,
    objective: str | None,
    steps: int,
    minutes: float | None,
    batch_tokens: int,
    learning_rate: float | None,
    draft_length: int,
    unroll: int | None,
    first_unroll: int,
    decoded: int,
    seed: int,
    threads: int | None,
    png: Path | None,
    json_path: Path | None,
) -> None:
    """Roll MODEL out at temperature 1 and train a drafter on what it sampled; one prompt in twenty is held out."""
    _threads(threads)
    if png is not None and find_spec("matplotlib") is None:
        raise invalid("--png", str(png), "needs matplotlib: install rollout-spec[plots]")
    if coverage is not None and kind == "eagle":
        raise invalid("--coverage", coverage, "kind 'eagle' uses the target's head; use --kind eagle3")
    start = start or ("layer" if kind == "eagle" else "random")
    if start == "layer" and kind != "eagle":
        raise invalid("--start", start, f"kind {kind!r} cannot; use --start random")
    objective = objective or ("eagle-tv" if start == "layer" else "kl")
    unroll = unroll or (min(3, draft_length) if start == "layer" else draft_length)
    warmup = min(30, steps // 4)
    config = TrainConfig(
        start=start,  # type: ignore[arg-type]
        learning_rate=_RATES[start] if learning_rate is None else learning_rate,
        relative_rate=start == "layer",
        final_rate=0.02 if start == "layer" else 0.1,
        warmup_steps=warmup,
        total_steps=steps,
        unroll=unroll,
        first_unroll=min(first_unroll, unroll),
        row_tokens=192,
        objective=_OBJECTIVES[objective][0],
        last_objective=_OBJECTIVES[objective][1],
        seed=seed,
    )
    console, began = Console(), time.perf_counter()
    engine = _engine(model)
    texts = _prompts(prompts, count, seed, "train")
    held = max(1, len(texts) // 20)
    clock = {"start": time.perf_counter() - began}
    began = time.perf_counter()
    console.print(f"rolling out {len(texts)} prompts", highlight=False)
    spec = EagleSpec.for_target(engine.backend.spec, kind)
    target = engine.backend.weights.target
    completions = engine.generate(texts, SamplingParams(n=n, max_tokens=max_tokens, seed=seed))
    clock["rollouts"] = time.perf_counter() - began
    began = time.perf_counter()
    tokens, episodes = None, episodes_of(target, spec, completions)
    if coverage is not None:
        tokens = choose_draft_tokens(token_counts(episodes, spec.vocab_size), coverage)
        if tokens is not None:
            spec = EagleSpec.for_target(engine.backend.spec, kind, draft_vocab_size=len(tokens))
    held_out, taught = episodes[: held * n], episodes[held * n :]
    trainer = new_trainer(target, spec, config, tokens, [episode.tokens for episode in taught])
    clock["features"] = time.perf_counter() - began

    def progress(metrics: StepMetrics, point: CurvePoint | None) -> None:
        if point is not None:
            found = point.held_out
            console.print(
                f"{point.seconds:6.0f} s  step {point.step:5d}  loss {metrics.loss:.3f}  held out: "
                f"alpha {found.alpha[0]:.3f}, tau {found.tau:.3f} (coupled {found.tau_coupled:.3f})",
                highlight=False,
                soft_wrap=True,
            )

    batches = EpisodeBatches(taught, batch_tokens, seed=seed)
    seconds = None if minutes is None else 60 * minutes
    began = time.perf_counter()
    done = train(
        trainer, batches, held_out, steps, draft_length=draft_length, seconds=seconds, progress=progress
    )
    clock["training"] = time.perf_counter() - began
    saver = Checkpointer(out)
    folder = saver.save(trainer, extra=batches.state_dict()).result()
    saver.close()
    console.print(f"saved in {folder}", highlight=False)
    if png is not None:
        draw(done, png)
    new = texts[:held] if prompts is not None else _prompts(None, decoded, seed, "test")
    results = {
        "checkpoint": str(folder),
        "spec": spec.to_dict(),
        "config": asdict(config),
        "seconds": clock,
        "sampled_tokens": sum(len(c.token_ids) for c in completions),
        "decoded": _decoded(model, trainer.module, new[:decoded], max_tokens, draft_length, seed, console),
        **done.to_dict(),
    }
    finish(Report("drafter train", results, evidence_level=EvidenceLevel.L1, seed=seed), json_path, console)


@command.command("eval")
@click.argument("checkpoint", type=_FOLDER)
@click.argument("model", type=_FOLDER)
@click.option("--prompts", type=_FILE, help="One per line; default: the arithmetic example's held-out ones.")
@click.option("--count", type=click.IntRange(1), default=400, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--draft-length", type=click.IntRange(1, 64), default=5, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; default: torch's own.")
@report_options
def eval_command(
    checkpoint: Path,
    model: Path,
    prompts: Path | None,
    count: int,
    max_tokens: int,
    draft_length: int,
    seed: int,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """What the drafter of CHECKPOINT is accepted with on new rollouts of MODEL, at temperature 1: computed, and decoded."""
    _threads(threads)
    saved, engine = read_checkpoint(checkpoint), _engine(model)
    texts = _prompts(prompts, count, seed, "test")
    episodes = roll_out(engine, saved.spec, texts, max_tokens=max_tokens, seed=seed)
    target = TargetTensors.of(engine.backend.weights.target)
    found: Acceptance = measure(saved.module().to(target.embed.device), target, episodes, draft_length)
    console = Console()
    shares = ", ".join(f"{share:.3f}" for share in found.alpha)
    console.print(f"alpha by step: {shares}\ntau at K={draft_length}: {found.tau:.3f} by rejection sampling, "
                  f"{found.tau_coupled:.3f} coupled; {found.tokens} tokens", highlight=False)  # fmt: skip
    decoded = _decoded(model, saved.module(), texts, max_tokens, draft_length, seed, console)
    results = asdict(found) | {"draft_length": draft_length, "decoded": decoded}
    finish(Report("drafter eval", results, evidence_level=EvidenceLevel.L1, seed=seed), json_path, console)


@command.command("export")
@click.argument("checkpoint", type=_FOLDER)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(LAYOUTS), default="vllm", show_default=True)
@click.option(
    "--dtype", type=click.Choice(("bfloat16", "float16", "float32")), default="bfloat16", show_default=True
)
@click.option("--target", default="", help="Name or path of the policy; for the speculators layout.")
@click.option("--draft-length", type=click.IntRange(1, 64), default=5, show_default=True)
@report_options
def export_command(
    checkpoint: Path,
    out: Path,
    layout: Any,
    dtype: str,
    target: str,
    draft_length: int,
    json_path: Path | None,
) -> None:
    """Write the drafter of CHECKPOINT to the folder OUT as vLLM loads it."""
    saved = read_checkpoint(checkpoint)
    folder = export(
        saved.spec, saved.weights, out,
        layout=layout, dtype=getattr(torch, dtype), target=target, draft_length=draft_length,
    )  # fmt: skip
    setting: dict[str, Any] = {
        "method": saved.spec.kind,
        "model": str(folder),
        "num_speculative_tokens": draft_length,
    }
    console = Console()
    console.print(f"vLLM: speculative_config={json.dumps(setting)}", highlight=False, soft_wrap=True)
    results = {"folder": str(folder), "layout": layout, "speculative_config": setting}
    finish(Report("drafter export", results, evidence_level=EvidenceLevel.L0), json_path, console)


def draw(done: Trained, path: Path) -> None:
    """Loss and acceptance over micro-batches, as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.plot([s.step for s in done.steps], [s.loss for s in done.steps], linewidth=0.8)
    left.set(xlabel="micro-batch", ylabel="loss", yscale="log")
    steps = [point.step for point in done.curve]
    right.plot(steps, [point.held_out.tau for point in done.curve], "o-", label="rejection")
    right.plot(steps, [point.held_out.tau_coupled for point in done.curve], "o--", label="coupled")
    right.set(xlabel="micro-batch", ylabel="tau, held out")
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _engine(model: Path, **speculation: Any) -> RolloutEngine:
    options = {"drafter": "none", "verifier": "rejection", "history": False} | speculation
    emulated = not torch.cuda.is_available() and BF16_FEATURES.isdisjoint(cpu_model()[1])
    return RolloutEngine.from_pretrained(model, dtype="float32" if emulated else "auto", speculation=options)


def _decoded(
    model: Path,
    module: EagleModule,
    prompts: Sequence[str | list[int]],
    max_tokens: int,
    draft_length: int,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """What is accepted when an engine really drafts `draft_length` tokens in every pass, under both verifiers."""
    found: dict[str, Any] = {}
    for verifier in ("rejection", "coupled") if prompts else ():
        engine = _engine(model, **drafting_only(draft_length, verifier))
        spec = decode(engine, module, prompts, SamplingParams(max_tokens=max_tokens, seed=seed + 1))
        found[verifier] = {
            "tau": spec.tau,
            "accepted_share_of_drafts": spec.acceptance,
            "verifications": spec.verify_steps,
            "prompts": len(prompts),
        }
        console.print(f"decoded, {verifier}: tau {spec.tau:.3f} at K={draft_length}", highlight=False)
    return found


def _prompts(file: Path | None, count: int, seed: int, split: str) -> list[str | list[int]]:
    if file is None:
        return list(load_problems().prompts(count, seed=seed + 1, split=split))
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        raise invalid("--prompts", str(file), "holds no line of text; give one prompt per line")
    return list(lines[:count])


def _threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
