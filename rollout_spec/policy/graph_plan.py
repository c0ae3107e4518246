"""Which CUDA graphs to capture: the least padding that a memory budget buys.

A graph is one kind of pass at one batch size. A step with B sequences replays the smallest graph that holds them;
the rows it has too many are padding. Every graph costs memory, whether it is replayed or not:

    bytes(graphs) = max over graphs  of scratch(graph)        one memory pool, captured from the largest down
                  + sum over graphs  of kernels(graph) * node_bytes
                  + sum over modes   of the largest outputs   written to buffers that the graphs of a mode share
                  + max over graphs  of inputs(graph)         read from buffers that all graphs share

So a batch size more costs kernels, and only a larger one than any before costs scratch. `plan_graphs` weighs both
against the rows they save. An eager pass counts as the rows its launches take.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from rollout_spec.policy.records import Trace

DECODE, DRAFT, VERIFY = "decode", "draft", "verify"

# Speculation may go off at any step: this part of every speculative pass counts as a plain one, too.
_OFF_SHARE = 0.05
_MOST_SIZES = 64  # graphs of one kind; serving engines capture about 50
_NO_SAVING = 1e-9  # rows per pass
_ROW_OUTPUT = 40  # bytes a row gives beside logits: token, three logprobs, counts

Demand = Mapping[tuple[int, int], float]
"""(B, S) to the expected number of passes over B sequences of S rows: S = 1 plain, S = K + 1 with K drafts."""


@dataclass(frozen=True, order=True)
class Kind:
    """What a graph computes, at any batch size.

    Attributes:
        mode: `decode` (one row per sequence), `draft` (the whole loop of K drafter steps, sampling included) or
            `verify` (one pass of the target over K + 1 rows per sequence).
        width: 1, K or K + 1.
    """

    mode: str
    width: int


@dataclass(frozen=True, order=True)
class Graph:
    """A kind of pass over `batch` sequences."""

    kind: Kind
    batch: int

    @property
    def rows(self) -> int:
        """Token rows it computes, over all steps of a draft loop."""
        return self.batch * self.kind.width


def strategies(draft_lengths: Iterable[int]) -> frozenset[Kind]:
    """The kinds of pass needed to decode plainly and to draft every K of `draft_lengths`."""
    pairs = ((Kind(DRAFT, k), Kind(VERIFY, k + 1)) for k in draft_lengths if k > 0)
    return frozenset({Kind(DECODE, 1)}.union(*pairs))


def demand_of(trace: Trace) -> Demand:
    """The passes of a recorded rollout."""
    return Counter((step.batch, step.longest + 1) for step in trace.steps)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder that fix the memory and the kernels of a forward.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: Sizes.
        itemsize: Bytes of an activation.
        layer_kernels: Kernels of one layer: 24 for `Decoder` with stock torch operations, about half with fused ones.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    itemsize: int = 2
    layer_kernels: int = 24

    def row_bytes(self, vocab_copies: float) -> int:
        """Scratch of one row where a forward is widest: in attention, in the MLP, or at the logits.

        Attention holds the residual, qkv, rotated qk and its output; the MLP the residual, gate_up and silu(gate),
        or its normed input; the head holds logits as computed and `vocab_copies` float32 tensors of their size.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden + (queries + 2 * keys) + (queries + keys) + queries
        mlp = self.hidden + 2 * self.intermediate + max(self.intermediate, self.hidden)
        head = self.vocab * (self.itemsize + 4 * vocab_copies)
        return int(max(self.itemsize * max(attention, mlp), self.itemsize * self.hidden + head))


@dataclass(frozen=True)
class GraphCost:
    """Bytes of captured graphs, predicted (the formula is the module's).

    Attributes:
        target, drafter: The models; a self-drafter has the target's shape.
        node_bytes: Device memory the driver keeps per kernel of a graph: 3.2 KiB were found for 60 graphs of a 1.5B
            model on an H200 (`benchmarks/results/gpu`), of which 2.5 times are allowed for. It depends on the
            driver: with 470 it seems to have been 64 KiB (NVIDIA forum, topic 244901). `GraphPool.capture` reports
            what it finds, and says so where that is over the budget.
        head_kernels: Kernels of a step outside the layers: embedding, head, sampling, copies.
        vocab_copies: float32 tensors of `[rows, vocab]` alive at once in sampling: raw logits, processed ones,
            probabilities. A top-p cut, which sorts, takes several more.
        logit_outputs: Modes whose graphs return float32 logits: drafts under rejection sampling, or passes that
            leave sampling to the caller.
        context: Tokens that the static block tables cover, for attention that gathers keys and values and adds a
            mask; 0 for kernels that read the paged cache in place.
        node_rows: Launching a kernel from the host takes as long as this many rows of compute. An assumption: 5 us
            against 25 us (7B in bf16 at 600 TFLOP/s).
    """

    target: ModelShape
    drafter: ModelShape
    node_bytes: int = 8192
    head_kernels: int = 48
    vocab_copies: float = 3.0
    logit_outputs: frozenset[str] = frozenset()
    context: int = 0
    node_rows: float = 0.2

    def kernels(self, kind: Kind) -> int:
        """Kernels of one graph, at any batch size."""
        drafts = kind.mode == DRAFT
        shape, steps = (self.drafter, kind.width) if drafts else (self.target, 1)
        return steps * (shape.layers * shape.layer_kernels + self.head_kernels)

    def scratch(self, graph: Graph) -> int:
        """Bytes of the shared pool that a graph uses; the steps of a draft loop reuse one another's."""
        drafts = graph.kind.mode == DRAFT
        shape, rows = (self.drafter, graph.batch) if drafts else (self.target, graph.rows)
        gathered = 2 * graph.batch * shape.kv_heads * shape.head_dim * shape.itemsize
        masked = 4 * graph.rows + 4 * rows * (shape.heads // shape.kv_heads)
        kept = 2 * graph.rows * 4 * shape.vocab if drafts and DRAFT in self.logit_outputs else 0
        return rows * shape.row_bytes(self.vocab_copies) + self.context * (gathered + masked) + kept

    def outputs(self, graph: Graph) -> int:
        """Bytes of what a graph returns."""
        logits = 4 * self.target.vocab if graph.kind.mode in self.logit_outputs else 0
        return graph.rows * (_ROW_OUTPUT + logits)

    def inputs(self, graph: Graph) -> int:
        """Bytes of what a graph reads: token, position, noise key and cache rows per row; tables, parameters."""
        return graph.rows * 8 * (3 + self.target.kv_heads) + graph.batch * (128 + self.context // 2)

    def nbytes(self, graphs: Iterable[Graph]) -> int:
        """Bytes of a set of graphs together."""
        graphs = list(graphs)
        outputs: dict[str, int] = {}
        for graph in graphs:
            outputs[graph.kind.mode] = max(outputs.get(graph.kind.mode, 0), self.outputs(graph))
        shared = max(map(self.scratch, graphs), default=0) + max(map(self.inputs, graphs), default=0)
        nodes = sum(self.kernels(graph.kind) for graph in graphs)
        return shared + sum(outputs.values()) + nodes * self.node_bytes

    def eager_rows(self, kind: Kind) -> float:
        """What a pass without a graph costs, in rows."""
        return self.kernels(kind) * self.node_rows


@dataclass(frozen=True)
class GraphPlan:
    """What to capture.

    Attributes:
        buckets: Batch sizes of each kind, rising. Plain decoding has at least its largest.
        cost: How bytes were counted.
        budget_bytes: What they were allowed to be.
        waste: Expected padding rows per pass of the demand, an eager pass counted as `GraphCost.eager_rows`.
    """

    buckets: Mapping[Kind, tuple[int, ...]]
    cost: GraphCost
    budget_bytes: int
    waste: float

    @property
    def graphs(self) -> list[Graph]:
        """In the order of capture: the largest scratch first, so that the others fit into the same pool."""
        graphs = [Graph(kind, batch) for kind, sizes in self.buckets.items() for batch in sizes]
        return sorted(graphs, key=lambda graph: (-self.cost.scratch(graph), graph))

    @property
    def nbytes(self) -> int:
        """Predicted bytes of all graphs."""
        return self.cost.nbytes(self.graphs)

    def graph(self, mode: str, batch: int, width: int) -> Graph | None:
        """The graph to replay for `batch` sequences of `width` rows, or None: run eagerly.

        A verify pass takes the one of fewest rows. A draft loop takes the one of fewest steps: a step reads all
        weights, a row does not.
        """
        fitting = [
            Graph(kind, sizes[bisect_left(sizes, batch)])
            for kind, sizes in self.buckets.items()
            if kind.mode == mode and kind.width >= width and sizes and sizes[-1] >= batch
        ]
        if mode == DRAFT:
            return min(fitting, default=None)
        return min(fitting, key=lambda graph: (graph.rows, graph), default=None)

    def table(self) -> str:
        """The plan for people: a line per kind, and the sum. Sizes in MiB."""
        lines = [f"{'mode':<8}{'width':>6}{'graphs':>8}{'kernels':>9}{'nodes':>9}{'scratch':>9}  batch sizes"]
        for kind, sizes in sorted(self.buckets.items()):
            kernels = self.cost.kernels(kind)
            nodes = len(sizes) * kernels * self.cost.node_bytes
            scratch = max((self.cost.scratch(Graph(kind, size)) for size in sizes), default=0)
            lines.append(
                f"{kind.mode:<8}{kind.width:>6}{len(sizes):>8}{kernels:>9}{_mib(nodes):>9}{_mib(scratch):>9}"
                f"  {' '.join(map(str, sizes)) or 'none (eager)'}"
            )
        lines.append(f"{_mib(self.nbytes)} of {_mib(self.budget_bytes)} MiB, {len(self.graphs)} graphs")
        return "\n".join(lines)


def plan_graphs(
    strategies: Iterable[Kind], max_batch: int, demand: Demand, cost: GraphCost, budget_bytes: int
) -> GraphPlan:
    """The graphs that save the most waste within `budget_bytes`.

    For every limit on scratch that matters: the best n batch sizes below it are found for every kind and n by
    dynamic programming, and the kinds then bid for graphs, largest saving per byte first, until the next does not
    fit. The best limit wins. A larger budget only lengthens these sequences, so it never wastes more. Plain
    decoding is always covered up to `max_batch`, and no kind beyond that.

    Args:
        strategies: Kinds of pass that may be run; plain decoding is always among them.
        max_batch: Most sequences decoded at once.
        demand: How often each (B, S) is expected. An S that no strategy has is run by the next wider one.
        cost: What graphs cost.
        budget_bytes: What they may cost together.

    Raises:
        ValueError: Not even one graph of plain decoding, for `max_batch` sequences, fits.
    """
    decode = Kind(DECODE, 1)
    smallest = cost.nbytes([Graph(decode, max_batch)])
    if smallest > budget_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes}: one graph that decodes {max_batch} sequences plainly takes {smallest} "
            "bytes; raise the budget or lower max_batch"
        )
    kinds = sorted({decode, *strategies})
    curves = {kind: _Curve(kind, row, cost) for kind, row in _shares(kinds, max_batch, demand).items()}
    whole = len(curves[decode].sizes)
    reaches = [{kind: whole if kind == decode else 0 for kind in kinds}]  # plain decoding alone
    limits = {scratch for curve in curves.values() for scratch in curve.scratch if scratch <= budget_bytes}
    for limit in sorted(limits):
        reach = {kind: bisect_right(curve.scratch, limit) for kind, curve in curves.items()}
        if reach[decode] == whole:
            reaches.append(reach)
    plans = []
    for reach in reaches:
        counts = _bid(curves, reach, cost, budget_bytes)
        if counts[decode]:
            buckets = {kind: curves[kind].best(counts[kind], reach[kind]) for kind in kinds}
            waste = float(sum(curves[kind].waste(reach[kind])[counts[kind]] for kind in kinds))
            plans.append(GraphPlan(buckets, cost, budget_bytes, waste))
    return min(plans, key=lambda plan: (plan.waste, plan.nbytes))


def vllm_capture_sizes(plan: GraphPlan) -> list[int]:
    """The same plan as vLLM's `cudagraph_capture_sizes`: tokens of each uniform decode batch, rising.

    Pass the list itself. A maximum alone is rounded down to vLLM's own steps, and when that drops
    (1 + K) * max_num_seqs, verification runs eagerly at a fifth of the speed (vllm#37865).
    """
    return sorted({graph.rows for graph in plan.graphs if graph.kind.mode != DRAFT})


def _shares(kinds: list[Kind], max_batch: int, demand: Demand) -> dict[Kind, np.ndarray]:
    """Passes of each kind at each batch size 0 .. max_batch, as parts of all passes demanded."""
    shares = {kind: np.zeros(max_batch + 1) for kind in kinds}
    total = sum(demand.values()) or 1.0
    for (batch, width), passes in demand.items():
        if not 0 < batch <= max_batch:
            raise ValueError(f"demand for {batch} sequences; batches are between 1 and max_batch={max_batch}")
        if width > 1:
            for mode, rows in ((DRAFT, width - 1), (VERIFY, width)):
                wide = [kind for kind in kinds if kind.mode == mode and kind.width >= rows]
                if wide:
                    shares[min(wide)][batch] += passes / total
        shares[Kind(DECODE, 1)][batch] += passes / total * (_OFF_SHARE if width > 1 else 1.0)
    return shares


class _Curve:
    """How waste falls with the number of graphs of one kind.

    Attributes:
        sizes: Batch sizes worth a graph: those with demand, and the largest for plain decoding.
        scratch: What a graph of each takes.
    """

    def __init__(self, kind: Kind, share: np.ndarray, cost: GraphCost) -> None:
        decodes = kind.mode == DECODE
        wanted = share > 0
        wanted[-1] |= decodes
        sizes = np.flatnonzero(wanted)
        self.sizes = sizes.tolist()
        self.scratch = [cost.scratch(Graph(kind, size)) for size in self.sizes]

        # padding[i, j]: of passes over more than sizes[i - 1] and at most sizes[j] sequences, run with sizes[j]
        below = np.concatenate(([0.0], share[sizes].cumsum()))
        rows = np.concatenate(([0.0], (share * np.arange(len(share)))[sizes].cumsum()))
        padding = sizes * (below[1:] - below[:-1, None]) - (rows[1:] - rows[:-1, None])
        padding = np.maximum(padding, 0.0) * kind.width
        padding[np.tri(len(sizes), k=-1, dtype=bool)] = np.inf

        least, self._before = list(padding[:1]), [np.zeros(0, int)]
        for _ in range(1, min(len(sizes), _MOST_SIZES)):
            longer = np.concatenate(([np.inf], least[-1][:-1]))[:, None] + padding
            self._before.append(longer.argmin(0))
            least.append(longer.min(0))
        eager = cost.eager_rows(kind) * (below[-1] - below)
        if decodes:
            eager[:-1] = np.inf
        self._none, self._ending = eager[0], [line + eager[1:] for line in least]  # by the largest size
        self._least = np.array([np.minimum.accumulate(line) for line in self._ending])

    def waste(self, reach: int) -> np.ndarray:
        """Least waste with 0, 1, 2, ... graphs among the first `reach` sizes."""
        return np.concatenate(([self._none], self._least[:reach, reach - 1] if reach else []))

    def best(self, count: int, reach: int) -> tuple[int, ...]:
        """The `count` sizes of that waste."""
        if not count:
            return ()
        last = int(self._ending[count - 1][:reach].argmin())
        chosen = [self.sizes[last]]
        for before in reversed(self._before[1:count]):
            last = int(before[last]) - 1
            chosen.append(self.sizes[last])
        return tuple(reversed(chosen))


def _bid(
    curves: Mapping[Kind, _Curve], reach: Mapping[Kind, int], cost: GraphCost, budget_bytes: int
) -> dict[Kind, int]:
    """How many graphs of each kind to have, of sizes within `reach`."""
    largest = [Graph(kind, curves[kind].sizes[count - 1]) for kind, count in reach.items() if count]
    nodes = {kind: cost.kernels(kind) * cost.node_bytes for kind in curves}
    free = budget_bytes - (cost.nbytes(largest) - sum(nodes[graph.kind] for graph in largest))
    bids: list[tuple[float, Kind]] = []
    for kind, curve in curves.items():
        saving = -np.diff(curve.waste(reach[kind]))
        bids += [(-saved / nodes[kind], kind) for saved in saving.tolist() if saved > _NO_SAVING]
    counts = dict.fromkeys(curves, 0)
    for _, kind in sorted(bids):
        free -= nodes[kind]
        if free < 0:
            break
        counts[kind] += 1
    return counts


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f}"
