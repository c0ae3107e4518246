"""A pool of CUDA graphs, captured as planned; on a CPU the same pool with plain calls in their place.

Use, per backend (`Kind`, `GraphPlan` and the memory they count are in `rollout_spec.policy.graph_plan`):

    fields = block_fields(cache, table_blocks) | {"tokens": Field((), torch.int64, per_row=True), ...}
    pool = GraphPool(plan, fields, build, device)      # build(kind) -> Program
    pool.capture()                                     # again after every change of weights or cache tensors
    logits, = pool.run("verify", batch, width, {"tokens": tokens, **block_inputs(block), ...})

A program reads its inputs from static buffers padded to the graph's batch and width, computes on the device alone,
and returns tensors whose first dims are [B] or [B, S]. What it must keep to:

- Addresses are baked in: weights and KV cache have to stay where they are. Whatever replaces them
  (`PolicyWeights.commit`, sleep) has to call `release` first and `capture` after.
- Host values are baked in, too: Python branches (`Stages`), numbers (the policy version in `row_keys`: pass a
  tensor). Passes that differ in them are different pools, or run eagerly.
- No reads back to the host, and no tensors made from host data, but at warm-up (cached constants).
- Verdicts over the batch (`Proposal.healthy`) are given per sequence.
- Drafts are as many for all: a sequence that wants fewer rows has its `draft_lengths`, which verification heeds.

A graph counts only if its replay gives what the program gives eagerly, on inputs other than those it was captured with:
kernels that record something else, or cannot be recorded, run eagerly, and a warning says so.

Padding is a sequence of one token at position 0, whose attention sees entry 0 of a table of scratch blocks, which are
zero, and whose keys and values go to the sink block, which nobody reads.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout_spec.policy.graph_plan import Graph, GraphPlan, Kind
from rollout_spec.torch_backend.kv_cache import KVCache
from rollout_spec.torch_backend.runner import Block, Runner

BLOCK_INPUTS = ("last_tokens", "draft_lengths", "tables", "positions", "kv_rows")

logger = logging.getLogger("rollout_spec")


@dataclass(frozen=True)
class Field:
    """An input `[B, *shape]`, or `[B, S, *shape]` if `per_row`.

    A narrower value may be given; what it leaves free, like the entries of padding, holds `pad`. The check of a
    captured graph takes `pad`, too, or integers below `trial` if that is given.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_row: bool = False
    pad: Tensor | float = 0
    trial: int = 0


@dataclass(frozen=True)
class Program:
    """What a kind of pass computes.

    Attributes:
        inputs: Names of the fields it reads.
        compute: From these inputs to outputs `[B, ...]` or `[B, S, ...]`.
        per_row: For each output, whether it is of the second sort.
        eager_because: Why it cannot be captured (it reads back to the host, say), or None.
    """

    inputs: tuple[str, ...]
    compute: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    per_row: tuple[bool, ...]
    eager_because: str | None = None


def block_fields(cache: KVCache, table_blocks: int, vocab_size: int = 1) -> dict[str, Field]:
    """The fields of a `Block` over tables of `table_blocks` blocks.

    That is the longest context that graphs run, and what every pass attends over where attention gathers.
    `vocab_size` is for the check of captured graphs.
    """
    sink = torch.tensor([cache.sink_block], device=cache.keys.device)
    kv_rows = cache.rows(sink, torch.zeros_like(sink))
    return {
        "last_tokens": Field((), torch.int64, trial=vocab_size),
        "draft_lengths": Field((), torch.int64),
        "tables": Field((table_blocks,), torch.int64, pad=cache.scratch_block),
        "positions": Field((), torch.int64, per_row=True),
        "kv_rows": Field(kv_rows.shape, torch.int64, per_row=True, pad=kv_rows),
    }


def block_inputs(block: Block, width: int | None = None) -> dict[str, Tensor]:
    """The inputs of a pass over `block`, or over its first `width` rows."""
    return {
        "last_tokens": block.last_tokens,
        "draft_lengths": block.draft_lengths,
        "tables": block.tables,
        "positions": block.positions[:, :width],
        "kv_rows": block.kv_rows[:, :width],
    }


def block_of(inputs: Mapping[str, Tensor]) -> Block:
    """The block inside a program."""
    return Block(**{name: inputs[name] for name in BLOCK_INPUTS})


def target_program(runner: Runner) -> Program:
    """One pass of the target over `tokens [B, S]`: decoding and verification up to the logits `[B, S, V]`."""

    def compute(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        block = block_of(inputs)
        return (runner.forward(runner.target, block, inputs["tokens"]),)

    return Program((*BLOCK_INPUTS, "tokens"), compute, per_row=(True,))


class StaticBuffer:
    """Memory for one input or output of every graph: the views of all shapes start at one address."""

    def __init__(self, field: Field, batch: int, rows: int, device: torch.device) -> None:
        self.field = field
        count = rows if field.per_row else batch
        self._flat = torch.zeros((count, *field.shape), dtype=field.dtype, device=device)
        self.nbytes = self._flat.nbytes

    def view(self, batch: int, width: int) -> Tensor:
        """`[batch, *shape]` or `[batch, width, *shape]`."""
        if not self.field.per_row:
            return self._flat[:batch]
        return self._flat[: batch * width].view(batch, width, *self.field.shape)

    def holds(self, value: Tensor) -> bool:
        """Whether `value` is no larger than this field in its trailing dims."""
        return all(n <= most for n, most in zip(value.shape[1 + self.field.per_row :], self.field.shape))

    def fill(self, view: Tensor, value: Tensor) -> None:
        """Write `value` to the front of `view`, and padding to the rest."""
        if view.shape != value.shape:
            view[:] = self.field.pad
        view[tuple(slice(n) for n in value.shape)].copy_(value, non_blocking=True)

    def try_out(self, view: Tensor) -> None:
        """Write what the check of a captured graph takes."""
        self.fill(view, view[:0])
        if self.field.trial:
            count = torch.arange(view.numel(), device=view.device)
            view.copy_((count * 7919 % self.field.trial).view(view.shape))


@dataclass(frozen=True)
class Captured:
    """What one graph took, by `pool` and by the driver, in bytes (0 on CPU) and seconds."""

    graph: Graph
    pool_bytes: int
    driver_bytes: int
    seconds: float


@dataclass(frozen=True)
class CaptureReport:
    """What capturing took, beside the plan.

    Attributes:
        captured: Per graph, in the order of capture; output buffers count with the first graph of a mode.
        eager: Kinds of which some or all sizes run eagerly, and why.
        input_bytes: Of the static inputs.
        plan: What was to be captured.
    """

    captured: tuple[Captured, ...]
    eager: Mapping[Kind, str]
    input_bytes: int
    plan: GraphPlan

    @property
    def nbytes(self) -> int:
        """Bytes taken, to compare with those of the plan."""
        return self.input_bytes + sum(one.pool_bytes + one.driver_bytes for one in self.captured)

    @property
    def node_bytes(self) -> float:
        """Driver bytes per kernel: `GraphCost.node_bytes` as measured here."""
        kernels = sum(self.plan.cost.kernels(one.graph.kind) for one in self.captured)
        return sum(one.driver_bytes for one in self.captured) / max(kernels, 1)

    def __str__(self) -> str:
        pool, driver = (
            sum(one.pool_bytes for one in self.captured),
            sum(one.driver_bytes for one in self.captured),
        )
        return (
            f"{len(self.captured)} graphs in {sum(one.seconds for one in self.captured):.1f} s; planned "
            f"{_mib(self.plan.nbytes)}, took {_mib(self.nbytes)}: {_mib(self.input_bytes)} of inputs, {_mib(pool)} in "
            f"torch's pool, {_mib(driver)} in the driver ({self.node_bytes:.0f} bytes per kernel of the plan)"
        )


class GraphPool:
    """Runs passes by replaying graphs, and eagerly where it has none.

    Args:
        plan: What to capture.
        fields: Every input that some program reads.
        build: The program of a kind; asked once per kind, also for kinds that are not in the plan.
        device: Where the programs run.

    Attributes:
        counts: Passes by how they ran: `graph`, or the reason they ran eagerly.
    """

    def __init__(
        self,
        plan: GraphPlan,
        fields: Mapping[str, Field],
        build: Callable[[Kind], Program],
        device: torch.device,
    ) -> None:
        self.plan, self.device, self._build = plan, device, build
        self.counts: Counter[str] = Counter()
        batch, rows = _extent(plan.graphs)
        self._inputs = {name: StaticBuffer(field, batch, rows, device) for name, field in fields.items()}
        self._input_bytes = sum(buffer.nbytes for buffer in self._inputs.values())
        self._programs: dict[Kind, Program] = {}
        self._reported = False
        self.release()

    def release(self) -> None:
        """Drop all graphs and their memory; passes run eagerly until the next `capture`."""
        self._replays: dict[Graph, Callable[[], None]] = {}
        self._outputs: dict[tuple[str, int], StaticBuffer] = {}

    @torch.inference_mode()
    def capture(self) -> CaptureReport:
        """Capture what is planned, from the largest graph to the smallest, on one memory pool."""
        self.release()
        recorder = _Recorder() if self.device.type == "cuda" else None
        captured, eager = [], {}
        for graph in self.plan.graphs:
            program = self._program(graph.kind)
            if program.eager_because is not None:
                eager[graph.kind] = program.eager_because
                continue
            before, start = _taken(self.device), time.perf_counter()
            try:
                compute = self._bind(graph, program)
                replay = recorder.record(compute) if recorder else compute
                pool, driver = (after - x for after, x in zip(_taken(self.device), before))
                problem = self._problem(graph, program, replay)
            except Exception as error:  # a guest's kernel, or memory; eagerly it may do
                problem = f"{type(error).__name__}: {error}"
            if problem is not None:
                eager[graph.kind] = problem
                continue
            self._replays[graph] = replay
            captured.append(Captured(graph, pool, driver, time.perf_counter() - start))
        report = CaptureReport(tuple(captured), eager, self._input_bytes, self.plan)
        self._report(report)
        return report

    def _problem(self, graph: Graph, program: Program, replay: Callable[[], None]) -> str | None:
        """What a replay gives that the program does not, on inputs that it was not captured with."""
        inputs = {name: self._inputs[name].view(graph.batch, graph.kind.width) for name in program.inputs}
        for name, view in inputs.items():
            self._inputs[name].try_out(view)
        expected = [value.clone() for value in program.compute(inputs)]
        replay()
        for index, (value, found) in enumerate(zip(expected, self._outputs_of(graph, program), strict=True)):
            if not _same(value, found):
                return f"output {index} of a replay is not what the pass gives eagerly"
        return None

    def _report(self, report: CaptureReport) -> None:
        """Log it, the first time only: every update of the weights captures again."""
        if not self._reported:
            over = report.nbytes > self.plan.budget_bytes
            logger.log(logging.WARNING if over else logging.INFO, "CUDA graphs: %s", report)
            for kind, why in report.eager.items():
                logger.warning(
                    "CUDA graphs: %s passes of width %d run eagerly (%s)", kind.mode, kind.width, why
                )
        self._reported = True

    def fitting(self, mode: str, batch: int, width: int) -> Graph | None:
        """The captured graph that `run` would replay."""
        graph = self.plan.graph(mode, batch, width)
        return graph if graph in self._replays else None

    @torch.inference_mode()
    def run(self, mode: str, batch: int, width: int, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """A pass over `inputs` of `batch` sequences and `width` rows each (or steps, of a draft loop).

        Returns:
            The program's outputs, cut to `[batch, ...]` or `[batch, width, ...]`. They are overwritten by the next
            pass of the same mode.

        Raises:
            ValueError: `inputs` are not those that the program reads.
        """
        graph = self.plan.graph(mode, batch, width)
        kind = graph.kind if graph else Kind(mode, width)
        program = self._program(kind)
        if inputs.keys() != set(program.inputs):
            raise ValueError(f"{kind} reads {sorted(program.inputs)}, not {sorted(inputs)}")
        reason = self._why_eager(graph, program, inputs)
        if reason:
            self.counts[reason] += 1
            return self._program(Kind(mode, width)).compute(inputs)
        assert graph is not None
        for name, value in inputs.items():
            buffer = self._inputs[name]
            assert value.shape[: 1 + buffer.field.per_row] == (batch, width)[: 1 + buffer.field.per_row], name
            buffer.fill(buffer.view(graph.batch, kind.width), value)
        self._replays[graph]()
        self.counts["graph"] += 1
        return tuple(
            out[:batch, :width] if rowwise else out[:batch]
            for out, rowwise in zip(self._outputs_of(graph, program), program.per_row)
        )

    def _outputs_of(self, graph: Graph, program: Program) -> list[Tensor]:
        """Where a replay writes, padding included."""
        mode, width = graph.kind.mode, graph.kind.width
        return [self._outputs[mode, index].view(graph.batch, width) for index in range(len(program.per_row))]

    def _why_eager(self, graph: Graph | None, program: Program, inputs: Mapping[str, Tensor]) -> str | None:
        if graph is None:
            return "no graph of this size"
        if program.eager_because is not None:
            return program.eager_because
        if graph not in self._replays:
            return "not captured"
        wide = [name for name, value in inputs.items() if not self._inputs[name].holds(value)]
        return f"{' and '.join(wide)} larger than captured" if wide else None

    def _program(self, kind: Kind) -> Program:
        if kind not in self._programs:
            self._programs[kind] = self._build(kind)
        return self._programs[kind]

    def _bind(self, graph: Graph, program: Program) -> Callable[[], None]:
        """The program on static buffers, run once on padding."""
        width = graph.kind.width
        inputs = {name: self._inputs[name].view(graph.batch, width) for name in program.inputs}
        for name, view in inputs.items():
            self._inputs[name].fill(view, view[:0])
        computed = program.compute(inputs)
        assert len(computed) == len(program.per_row), f"{graph.kind} returned {len(computed)} outputs"
        outputs = [
            self._output(graph.kind.mode, index, value, program.per_row[index]).view(graph.batch, width)
            for index, value in enumerate(computed)
        ]

        def compute() -> None:
            for output, value in zip(outputs, program.compute(inputs)):
                assert output.shape == value.shape, f"{graph.kind}: {value.shape}, not {output.shape}"
                output.copy_(value)

        return compute

    def _output(self, mode: str, index: int, value: Tensor, per_row: bool) -> StaticBuffer:
        """Where output `index` of a mode goes; made for all graphs of the mode when the first needs it."""
        if (mode, index) not in self._outputs:
            field = Field(tuple(value.shape[1 + per_row :]), value.dtype, per_row)
            batch, rows = _extent(graph for graph in self.plan.graphs if graph.kind.mode == mode)
            self._outputs[mode, index] = StaticBuffer(field, batch, rows, self.device)
        return self._outputs[mode, index]


class _Recorder:
    """Records CUDA graphs, one after the other, on one memory pool and one stream."""

    def __init__(self) -> None:
        self._memory, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Returns what replays `compute`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()  # warm-up: lazy initialisation must not be captured
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            compute()
        graph.replay()  # uploads it, so that the driver's memory is taken by now
        return graph.replay


def _extent(graphs: Iterable[Graph]) -> tuple[int, int]:
    """Most sequences and most rows of any graph."""
    sizes = [(graph.batch, graph.rows) for graph in graphs]
    return max(batch for batch, _ in sizes), max(rows for _, rows in sizes)


def _same(expected: Tensor, found: Tensor) -> bool:
    """Whether outputs agree: integers exactly, logits as nearly as two runs of one kernel."""
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    return torch.allclose(expected, found, rtol=1e-3, atol=1e-3, equal_nan=True)


def _taken(device: torch.device) -> tuple[int, int]:
    """Device memory taken by torch's allocator, and by everything else, in bytes."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what warm-ups leave behind
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return reserved, total - free - reserved


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
