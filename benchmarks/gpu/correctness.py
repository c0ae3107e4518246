"""The part that comes first: what is computed on this device is right, before it is timed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from figures import Part
from lab import graph_shape
from passes import Passes
from timings import PREFERRED, Bench

from rollout_spec.contracts import SamplingParams
from rollout_spec.drafters.history import History
from rollout_spec.drafters.quantize import available_quantizers
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import example_folder, load_problems
from rollout_spec.models.checkpoint import read_checkpoint
from rollout_spec.policy.baselines import Off, RandomLengths
from rollout_spec.policy.graph_plan import DECODE, DRAFT, VERIFY, GraphCost, GraphPlan, Kind
from rollout_spec.proofs.prove import Proof, Settings
from rollout_spec.proofs.runs import Requests
from rollout_spec.proofs.trajectories import compare
from rollout_spec.torch_backend.slots import Prompt, Sample

LARGEST_DISTANCE = 0.02  # mean total variation between distributions in bf16 here and in float32 on a CPU
_TOKENS, _TEXTS = 96, 8


class OutOfTime(Exception):
    """The proof was stopped between two of its stages."""


def correctness(bench: Bench, part: Part) -> None:
    """Exactness of the shipped policy on this device."""
    folder = example_folder() / "policy"
    kinds = available_quantizers(bench.device, torch.bfloat16)
    kind = next(kind for kind in PREFERRED if kinds[kind] is None)
    speculation = {"drafter": kind, "verifier": "coupled", "draft_length": 4, "canary_min_acceptance": 0.0}
    engine = RolloutEngine.from_pretrained(
        folder, device=str(bench.device), seed=bench.seed, speculation=speculation
    )
    part.keep(drafter=kind, not_available={name: reason for name, reason in kinds.items() if reason})
    with part.attempt("logits against float32 on the CPU"):
        _against_cpu(bench, part, engine)
    with part.attempt("row invariance"):
        _row_invariance(part, engine)
    near_tie = 0.0
    with part.attempt("proof"):
        near_tie = _proof(bench, part, engine)
    with part.attempt("history and ragged drafts"):
        _history_and_ragged(bench, part, engine, near_tie)
    with part.attempt("graphs"):
        _graphs(bench, part, engine)


def _against_cpu(bench: Bench, part: Part, engine: RolloutEngine) -> None:
    """The proof compares the device with itself; this compares it with float32 on the CPU, on the policy's own text."""
    folder, problems = example_folder() / "policy", load_problems()
    reference = RolloutEngine.from_pretrained(
        folder, device="cpu", dtype="float32", speculation={"drafter": "none"}
    )
    rng, distances = random.Random(bench.seed), []
    assert engine.tokenizer is not None
    for problem in problems.sample(_TEXTS, bench.seed, "test"):
        tokens = np.array(engine.tokenizer(problem.prompt + problems.solve(problem, rng))["input_ids"])
        ours, theirs = (
            e.backend.score(e.backend.weights.target, tokens).softmax(-1).cpu() for e in (engine, reference)
        )
        distances.append((ours - theirs).abs().sum(-1) / 2)
    distance = float(torch.cat(distances).mean())
    value = f"{distance:.2g} over {sum(map(len, distances))} tokens"
    part.check(
        "total variation from float32 on the CPU",
        value,
        f"<= {LARGEST_DISTANCE}",
        distance <= LARGEST_DISTANCE,
    )


def _row_invariance(part: Part, engine: RolloutEngine) -> None:
    """The probe's verdict, and how far one row alone is from the same row among others."""
    backend = engine.backend
    tokens = np.random.default_rng(1).integers(0, backend.spec.vocab_size, _TOKENS)
    blocks = backend.pool.allocate(-(-_TOKENS // backend.config.block_size))
    try:
        with torch.inference_mode():
            whole = backend.runner.score(backend.runner.target, tokens, blocks).log_softmax(-1)
            alone = [
                backend.runner.score(backend.runner.target, tokens[: row + 1], blocks, row).log_softmax(-1)
                for row in range(_TOKENS)
            ]
    finally:
        backend.pool.free(blocks)
    differences = (torch.cat(alone) - whole)[:, : backend.spec.vocab_size].abs()
    part.figure(
        "correctness/row_difference", float(differences.max()), "nats", level=None, row_invariant=backend.row_invariant,
        rows_that_differ=float((differences > 0).any(1).float().mean()), mean=float(differences.mean()),
    )  # fmt: skip


def _proof(bench: Bench, part: Part, engine: RolloutEngine) -> float:
    """What `rollout-spec verify` runs, for both verifiers; returns the margin that counts as a near-tie."""
    prompts, seeds, longest, samples = bench.scale.proof
    assert engine.tokenizer is not None
    texts = load_problems().prompts(prompts, bench.seed, "test")
    ids = [list(engine.tokenizer(text)["input_ids"]) for text in texts]

    def progress(stage: str) -> None:
        if part.spent:
            raise OutOfTime(f"stopped before: {stage}")

    policy = example_folder() / "policy"
    proof = Proof(engine, Settings(ids, seeds, longest, samples), lambda: read_checkpoint(policy), progress)
    try:
        proof.run()
    finally:
        found = proof.verdict
        for check in found.checks:
            part.check(f"verify: {check.name}", check.value, check.target, check.passed)
        level = None if found.level is None else found.level.value
        part.keep(exactness=level, claimed=engine.stats().exactness, proof=found.results)
    return max(_near_ties(found.results), default=0.0)


def _near_ties(results: Mapping[str, Any]) -> list[float]:
    return [
        value["near_tie"] for value in results.values() if isinstance(value, dict) and "near_tie" in value
    ]


def _history_and_ragged(bench: Bench, part: Part, engine: RolloutEngine, near_tie: float) -> None:
    """Drafts of different lengths, some from history: the tokens of plain decoding, at the level claimed."""
    prompts, seeds, longest, _ = bench.scale.proof
    assert engine.tokenizer is not None
    texts = load_problems().prompts(prompts, bench.seed + 1, "test")
    ids = [list(engine.tokenizer(text)["input_ids"]) for text in texts]
    requests = Requests.build(ids, seeds, longest, engine.backend.row_invariant)
    plain = requests.run(engine, Off())
    engine.backend.history = History(1_000_000)
    try:
        drafted = [requests.run(engine, RandomLengths(bench.seed + turn, longest=8)) for turn in range(2)]
    finally:
        engine.backend.history = None
    for turn, completions in enumerate(drafted):
        found = compare(engine, plain, completions, requests.params)
        spec = sum(c.spec.drafted for c in completions)
        tied = (
            not found.margins if engine.backend.row_invariant else max(found.margins, default=0.0) <= near_tie
        )
        value = f"{found.tokens} tokens, {spec} drafted, {found.diverging} of {found.sequences} part"
        target = f"the same at {engine.stats().exactness}" + (
            "" if engine.backend.row_invariant else f", ties <= {near_tie:.2g}"
        )
        part.check(f"history and ragged drafts, run {turn + 1}", value, target, tied and spec > 0)
        part.keep(**{f"history_margins_{turn + 1}": list(found.margins)})


@torch.inference_mode()
def _graphs(bench: Bench, part: Part, engine: RolloutEngine) -> None:
    """Graphs of the batch's own size give the same tokens; larger ones pad, and then rows differ in the last bits."""
    backend, K, B = engine.backend, 3, 3
    drafter = backend.weights.drafter
    assert isinstance(drafter, QuantizedSelfDrafter)
    rng, samples = np.random.default_rng(bench.seed), []
    for index in range(B):
        tokens = rng.integers(4, backend.spec.vocab_size, 20 + 30 * index)
        sample = Sample(f"graph-{index}", 0, Prompt(tokens), SamplingParams(), index, len(tokens) + 16, ())
        backend.scheduler.submit(sample)
        samples.append(sample)
    for sample in backend.scheduler.admit():
        backend.assign(sample)
    chunks = backend.scheduler.prefills()
    backend.runner.prefill(backend.slots, chunks)
    for chunk in chunks:
        backend.scheduler.prefilled(chunk)
    slots = backend.scheduler.ready()
    assert len(slots) == B
    shape = graph_shape(backend.spec)
    outcomes = {}
    for name, size in (("eager", B), ("same size", B), ("padded", B + 1)):
        kinds = {Kind(DECODE, 1): (size,), Kind(DRAFT, K): (size,), Kind(VERIFY, K + 1): (size,)}
        plan = GraphPlan(kinds, GraphCost(shape, shape, context=128), 1 << 40, 0.0)
        passes = Passes(backend, drafter, plan, 128, capture=name != "eager")
        block, keys = passes.block(slots, np.full(B, K))
        drafts = passes.draft(block, keys).clone()
        verdict = passes.verify(block, keys, drafts)
        outcomes[name] = torch.cat((drafts, verdict.tokens, verdict.accepted[:, None]), 1).clone()
        part.keep(**{f"graph_passes_{name.replace(' ', '_')}": dict(passes.pool.counts)})
    same = torch.equal(outcomes["same size"], outcomes["eager"])
    part.check("graph replay equals eager", same, "equal tokens and verdict", same)
    parted = int((outcomes["padded"] != outcomes["eager"]).sum())
    part.check(
        "padded graph against eager",
        f"{parted} differ",
        "0 if row-invariant",
        parted == 0 or not backend.row_invariant,
    )
    backend.abort(samples)
