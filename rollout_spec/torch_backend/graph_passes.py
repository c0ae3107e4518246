"""The backend's decode passes on captured graphs, where one fits; the others run eagerly.

Captured are the target's forward, for plain decoding and for verification, up to the logits; and the drafter's whole
loop with its sampling. What becomes of the target's logits (stages, verdict, logprobs) differs between requests and
reads nothing back, so it stays eager and is launched while the graph runs. Whether anybody drafts is no matter to
plain decoding's graphs.

- Attention gathers all that a block table has room for, so there is one pool per length of context: each covers
  four times the tokens of the one before, and a pass takes the first that holds its longest sequence.
- Ragged draft lengths run as rectangles if that pads fewer rows than an eager pass costs in launches, by the measure
  of `GraphCost.eager_rows`. A draft loop may take at most twice the steps that are wanted.
- Drafting behind history's tokens, and for requests that use any stage but temperature, is eager.
- Weights and cache are held by address. A pass whose weights, drafter, cache or verifier are not those captured is
  eager; `capture` makes graphs of what is in force. Every update and `wake_up` captures anew: no memory beside the
  budget, but the time of about five eager runs of every graph (`CaptureReport.captured` has it).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.drafters.base import Proposal
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.models.spec import ModelSpec
from rollout_spec.policy.graph_plan import (
    DECODE,
    DRAFT,
    VERIFY,
    Demand,
    Graph,
    GraphCost,
    GraphPlan,
    Kind,
    ModelShape,
    plan_graphs,
    strategies,
)
from rollout_spec.sampling.pipeline import SamplingBatch, Stages
from rollout_spec.sampling.verify import Ragged
from rollout_spec.torch_backend.attention import padded_blocks
from rollout_spec.torch_backend.drafting import Drafts
from rollout_spec.torch_backend.graphs import (
    BLOCK_INPUTS,
    Field,
    GraphPool,
    Program,
    block_fields,
    block_inputs,
    block_of,
    target_program,
)
from rollout_spec.torch_backend.runner import Block

if TYPE_CHECKING:
    from rollout_spec.torch_backend.backend import TorchBackend

DEFAULT_BYTES = 4 << 30  # planned; as driver memory per kernel is counted, most likely more than it takes
_SHORTEST_CONTEXT, _CONTEXT_STEP = 1024, 4
_MOST_ROWS = 512  # of a verify pass that is expected: with more, launches hardly count

logger = logging.getLogger("rollout_spec")


def model_shape(spec: ModelSpec, dtype: torch.dtype) -> ModelShape:
    """What planning wants to know of a model."""
    return ModelShape(
        spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim,
        spec.padded_vocab_size, torch.empty(0, dtype=dtype).itemsize,
    )  # fmt: skip


def expected_passes(max_batch: int, draft_lengths: list[int]) -> Demand:
    """What is demanded of graphs where nothing is known of the rollouts.

    Rollouts thin out, so every doubling of the batch counts alike. Half of the passes are plain, half speculate with
    each draft length alike, in batches that verify up to `_MOST_ROWS` rows. Batch sizes are 2^i and 3 * 2^i.
    """
    batches = {min(padded_blocks(batch), max_batch) for batch in range(1, max_batch + 1)}
    demand = {(batch, 1): 1.0 for batch in batches}
    for k in draft_lengths:
        fitting = {batch for batch in batches if batch * (k + 1) <= _MOST_ROWS}
        demand |= {(batch, k + 1): 1.0 / len(draft_lengths) for batch in fitting}
    return demand


class GraphPasses:
    """Runs a backend's passes on graphs.

    Args:
        backend: Started, with weights in force and a verifier chosen.
        budget_bytes: What graphs may cost together, see `GraphCost`.

    Attributes:
        counts: Passes so far, by (mode, whether a graph ran).

    Raises:
        InvalidRequest: Not one graph of plain decoding fits.
    """

    def __init__(self, backend: TorchBackend, budget_bytes: int) -> None:
        self._backend, self._runner = backend, backend.runner
        self.counts: Counter[tuple[str, bool]] = Counter()
        self._captured: tuple[object, ...] = ()
        contexts = self._contexts()
        plans = {blocks: self._plan(blocks, budget_bytes // len(contexts)) for blocks in contexts}
        self._pools = {
            blocks: GraphPool(plan, self._fields(blocks), self._program, backend.device)
            for blocks, plan in plans.items()
            if plan is not None
        }
        if not self._pools:
            needed = self._cost(contexts[0]).nbytes([Graph(Kind(DECODE, 1), 1)]) * len(contexts)
            raise invalid("graph_bytes", budget_bytes, f"use at least {needed}, or 0 to do without graphs")
        for blocks, pool in self._pools.items():
            logger.info("CUDA graphs of up to %d tokens:\n%s", blocks * self._block_size, pool.plan.table())

    @torch.inference_mode()
    def capture(self) -> None:
        """Make graphs of the weights, the drafter and the cache in force; none while there are none."""
        self.release()
        backend = self._backend
        if backend.cache.released or not backend.weights.target.weights.layers:
            return
        scratch, generator = backend.cache.scratch_block, torch.Generator(backend.device).manual_seed(0)
        for cache in (backend.cache.keys, backend.cache.values):
            cache[:, :, scratch].normal_(generator=generator)  # graphs are checked with attention at work
        for pool in self._pools.values():
            pool.capture()
        backend.cache.wipe([scratch])
        self._captured = self._in_force()

    def release(self) -> None:
        """Drop all graphs, before what they point at goes; passes run eagerly until the next `capture`."""
        self._captured = ()
        for pool in self._pools.values():
            pool.release()

    # --- passes ----------------------------------------------------------------------------------------

    def forward(self, block: Block, tokens: Tensor, ragged: Ragged | None) -> Tensor | None:
        """The target's logits of `tokens [B, S]`: `[B, S, V]`, or `[R, 1, V]` of ragged rows; None if no graph fits."""
        batch, width = block.shape
        rows = batch * width if ragged is None else len(ragged.cells)
        mode = VERIFY if width > 1 else DECODE
        pool = self._pool(mode, block, width, rows)
        if pool is None:
            return None
        (logits,) = pool.run(mode, batch, width, {"tokens": tokens, **block_inputs(block)})
        if ragged is None:
            return logits
        return logits[ragged.cells // width, ragged.cells % width].unsqueeze(1)

    def propose(self, drafts: Drafts) -> Proposal | None:
        """What the drafter proposes; None if no graph fits."""
        block, active = drafts.block, drafts.round.active
        batch, steps = block.shape[0], len(active)
        plain = replace(drafts.batch.stages, temperature=True) == Stages(temperature=True)
        pool = self._pool(DRAFT, block, steps, sum(active), plain and not drafts.follow_history)
        if pool is None:
            return None
        inputs = {
            "keys": drafts.keys[:, :steps],
            "temperature": drafts.batch.temperature,
            **block_inputs(block, steps),
        }
        tokens, healthy, *logits = pool.run(DRAFT, batch, steps, inputs)

        def by_step(x: Tensor) -> list[Tensor]:
            return [x[:count, step : step + 1] for step, count in enumerate(active)]

        return Proposal(by_step(tokens), by_step(logits[0]) if logits else None, healthy.all())

    def _pool(
        self, mode: str, block: Block, width: int, rows: int, captured: bool = True
    ) -> GraphPool | None:
        """The pool with a graph for a pass of which `rows` are wanted; None where eager is possible or cheaper only."""
        pool = next((pool for blocks, pool in self._pools.items() if blocks >= block.tables.shape[1]), None)
        graph = None
        if pool is not None and captured and self._is_captured(mode):
            graph = pool.fitting(mode, block.shape[0], width)
        if graph is not None:
            assert pool is not None
            padding, steps = graph.rows - rows, graph.kind.width if mode == DRAFT else width
            if padding > pool.plan.cost.eager_rows(Kind(mode, width)) or steps > 2 * width:
                graph = None
        self.counts[mode, graph is not None] += 1
        return pool if graph is not None else None

    def _in_force(self) -> tuple[object, ...]:
        """What graphs hold by address, or decided on the host: the target's, then the self-drafter's besides."""
        backend, weights = self._backend, self._backend.weights
        drafter, model = weights.drafter, None
        if isinstance(drafter, QuantizedSelfDrafter) and drafter.version >= 0:
            model = drafter.model.weights
        features = self._runner.features
        return backend.cache.keys, weights.target.weights, features, drafter, model, backend.coupled

    def _is_captured(self, mode: str) -> bool:
        in_force = self._in_force()[: None if mode == DRAFT else 3]
        return bool(self._captured) and all(a is b for a, b in zip(in_force, self._captured))

    # --- programs --------------------------------------------------------------------------------------

    def _program(self, kind: Kind) -> Program:
        if kind.mode != DRAFT:
            return target_program(self._runner)
        outputs = (True, False) if self._backend.coupled else (True, False, True)
        return Program((*BLOCK_INPUTS, "keys", "temperature"), self._loop(kind.width), outputs)

    def _loop(self, steps: int) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]:
        """A whole draft loop with sampling: tokens `[B, K]`, health `[B]` and, for rejection, logits `[B, K, V]`."""
        backend = self._backend

        def compute(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            drafter = backend.weights.drafter
            assert drafter is not None, "nobody drafts"
            block, batch = block_of(inputs), SamplingBatch.tempered(inputs["temperature"])
            zeros = np.zeros(len(inputs["keys"]), np.int64)
            drafts = Drafts(
                zeros + steps, zeros, None, block, batch, inputs["keys"], self._runner, backend.coupled
            )
            found = drafter.propose(drafts.round)
            logits = () if found.logits is None else (torch.cat(found.logits, 1),)
            return torch.cat(found.tokens, 1), found.healthy.expand(len(zeros)), *logits

        return compute

    # --- planning --------------------------------------------------------------------------------------

    @property
    def _block_size(self) -> int:
        return self._backend.config.block_size

    def _contexts(self) -> list[int]:
        """Blocks of the tables that the pools are for, rising; the last hold the longest sequence."""
        longest = padded_blocks(-(-self._backend.max_model_len // self._block_size))
        contexts = [min(longest, padded_blocks(_SHORTEST_CONTEXT // self._block_size))]
        while contexts[-1] < longest:
            contexts.append(min(longest, contexts[-1] * _CONTEXT_STEP))
        return contexts

    def _cost(self, table_blocks: int) -> GraphCost:
        shape = model_shape(self._backend.spec, self._backend.dtype)
        logits = {DECODE, VERIFY} if self._backend.coupled else {DECODE, VERIFY, DRAFT}
        return GraphCost(
            shape, shape, logit_outputs=frozenset(logits), context=table_blocks * self._block_size
        )

    def _plan(self, table_blocks: int, budget_bytes: int) -> GraphPlan | None:
        """For batches so large that plain decoding of the largest takes a quarter, or for one; None if that is too much.

        Larger batches run eagerly: they gain least from graphs and would take what the tail of a rollout needs.
        """
        cost, batch = self._cost(table_blocks), self._backend.config.max_num_seqs

        def decoding(batch: int) -> int:
            return cost.nbytes([Graph(Kind(DECODE, 1), batch)])

        while batch > 1 and decoding(batch) > budget_bytes // 4:
            batch //= 2
        if decoding(batch) > budget_bytes:
            return None
        lengths = self._draft_lengths()
        return plan_graphs(strategies(lengths), batch, expected_passes(batch, lengths), cost, budget_bytes)

    def _draft_lengths(self) -> list[int]:
        """K of the draft loops worth capturing: the fixed one, or 2^i up to the longest, and that."""
        options = self._backend.config.speculation
        if not isinstance(self._backend.weights.drafter, QuantizedSelfDrafter):
            return []
        if options.draft_length is not None:
            return [options.draft_length]
        longest = options.longest_draft
        return sorted({min(1 << (k - 1).bit_length(), longest) for k in range(1, longest + 1)})

    def _fields(self, table_blocks: int) -> dict[str, Field]:
        vocab_size = self._backend.spec.vocab_size
        fields = block_fields(self._backend.cache, table_blocks, vocab_size)
        positions = min(self._block_size, self._backend.max_model_len)
        return fields | {
            "positions": replace(fields["positions"], trial=positions),
            "tokens": Field((), torch.int64, per_row=True, trial=vocab_size),
            "keys": Field((), torch.int64, per_row=True, trial=1 << 40),
            "temperature": Field((), torch.float32, pad=1.0),
        }


def choose_graphs(backend: TorchBackend) -> GraphPasses | None:
    """As configured: on CUDA `graph_bytes` of them, None for `DEFAULT_BYTES`; elsewhere there are none."""
    wanted = backend.config.graph_bytes
    if backend.device.type != "cuda" or wanted == 0:
        return None
    try:
        return GraphPasses(backend, DEFAULT_BYTES if wanted is None else wanted)
    except ValueError:
        if wanted is not None:
            raise
        logger.warning("no CUDA graphs: none fits %d bytes; raise graph_bytes", DEFAULT_BYTES)
        return None
