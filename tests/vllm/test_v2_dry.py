"""The V2 runner's self-drafter, dry: vLLM's own speculator classes on CPU, with stand-ins for what needs a GPU.

The stand-ins are the block tables, attention metadata, Gumbel sampling (Triton kernels), graphs, which call what was
captured again, and a toy model, which keeps token ids in its KV cache and whose next token depends on every one of
them: a draft is right only if each key before it lies in the slot where the target put it. `test_on_newest` runs the
file again over the newest supported release.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace as Record

import pytest
import torch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

BLOCK, BLOCKS, LIMIT, VOCAB, REQUESTS = 4, 48, 40, 97, 4
LAYER, DRAFT = "model.layers.0.self_attn.attn", "draft_model.model.layers.0.self_attn.attn"
GARBAGE = 10**9


def following(tokens: list[int]) -> int:
    """The toy's greedy next token: a function of every token and its place."""
    return sum((place + 3) * token for place, token in enumerate(tokens)) % VOCAB


def continuation(tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[-count:]


@pytest.fixture(scope="module")
def v2():
    """The module under test and the vLLM module that its base class takes its helpers from."""
    from vllm.v1.worker.gpu.spec_decode import speculator

    from rollout_spec.integrations.vllm import self_drafter_v2

    return Record(ours=self_drafter_v2, base=speculator, stock=sys.modules[self_drafter_v2.Stock.__module__])


class Toy(torch.nn.Module):
    """Writes token ids to the cache as attention writes keys, then reads the whole context back."""

    def __init__(self, context: dict, layer: str) -> None:
        super().__init__()
        self.context, self.layer, self.now = context, layer, None

    def forward(self, input_ids, positions):
        assert int(input_ids.min()) >= 0 and int(input_ids.max()) < VOCAB, "an id outside of the vocabulary"
        hidden = torch.zeros(len(input_ids), VOCAB)
        if self.now.metadata is None:
            return hidden
        cache = self.context[self.layer].kv_cache
        slots, metadata = self.now.slots[self.layer], self.now.metadata[self.layer]
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot] = input_ids[row]
        for row, length in enumerate(metadata.seq_lens.tolist()):
            where = [
                int(metadata.table[row, place // BLOCK]) * BLOCK + place % BLOCK for place in range(length)
            ]
            hidden[row, following(cache[where].tolist())] = 1.0
        return hidden

    def compute_logits(self, hidden):
        return hidden


class Tables:
    """Block tables whose slot mapping is computed by torch: index -1 owns nothing and writes nowhere."""

    num_kv_cache_groups = cp_size = 1

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.input_block_tables = [torch.zeros_like(rows)]
        self.slot_mappings = torch.full((1, 64), -1)

    def gather(self, slots: torch.Tensor) -> None:
        self.input_block_tables[0][: len(slots)] = self.rows[slots.long()]

    def compute_slot_mappings(self, slots, ends, positions, padded, out=None):
        for row, slot in enumerate(slots.tolist()):
            for at in range(int(ends[row]), int(ends[row + 1])):
                place = int(positions[at])
                block = int(self.rows[slot, place // BLOCK]) if slot >= 0 else -1
                self.slot_mappings[0, at] = block * BLOCK + place % BLOCK if slot >= 0 else -1
        return self.slot_mappings[:, :padded]


@pytest.fixture
def dry(v2, monkeypatch):
    """A loaded and attached SelfSpeculator, K_max = 3, over requests in slots 0…3 with blocks of their own."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Layer(AttentionLayerBase):
        def __init__(self) -> None:
            self.kv_cache = torch.tensor([])

        def get_attn_backend(self):
            return None

        def get_kv_cache_spec(self, vllm_config):
            return "allocates"

    context: dict = {LAYER: Layer()}
    now = Record(metadata=None, slots=None)

    @contextmanager
    def forward_context(metadata, vllm_config, *, slot_mapping, **options):
        now.metadata, now.slots = metadata, slot_mapping
        yield

    checked = inspect.signature(v2.base.build_attn_metadata)

    def build(**given):
        checked.bind(**given)
        assert given["max_seq_len"] >= int(given["seq_lens"].max())
        assert (given["seq_lens_cpu_upper_bound"] >= given["seq_lens"]).all()
        metadata = Record(seq_lens=given["seq_lens"].clone(), table=given["block_tables"][0])
        return {name: metadata for group in given["attn_groups"] for name in group}

    def attention_groups(config, vllm_config, device, active_layer_names):
        return (
            [list(active_layer_names.intersection(g.layer_names)) for g in config.kv_cache_groups],
            None,
            [],
        )

    def gumbel(logits, slots, temperature, seeds, positions, *, logits_cache, logits_cache_col, **options):
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                logits_cache[slot, int(logits_cache_col)] = logits[row]
        return torch.where(slots >= 0, logits.argmax(-1), GARBAGE)

    def load(self, target_model, target_attn_layer_names):
        context[DRAFT] = Layer()
        toy = Toy(context, DRAFT)
        toy.now = now
        return toy

    monkeypatch.setattr(v2.base, "_target_feeds_hc_residual", lambda config: False)
    monkeypatch.setattr(v2.base, "init_attn_backend", attention_groups)
    monkeypatch.setattr(v2.base, "build_attn_metadata", build)
    monkeypatch.setattr(v2.base, "gumbel_sample", gumbel)
    if hasattr(v2.base.DraftModelSpeculator, "_configure_decode_metadata_update"):
        monkeypatch.setattr(
            v2.base.DraftModelSpeculator, "_configure_decode_metadata_update", lambda self: None
        )
    monkeypatch.setattr(v2.stock, "set_forward_context", forward_context)
    monkeypatch.setattr(v2.ours, "check_layers", lambda *given: None)
    monkeypatch.setattr(v2.ours.Stock, "load_draft_model", load)

    config = stand_in_config(context)
    speculator = v2.ours.SelfSpeculator(config, torch.device("cpu"))
    speculator.load_model(torch.nn.Identity())
    tables = Tables(torch.arange(1, 1 + REQUESTS * LIMIT // BLOCK).view(REQUESTS, -1))
    group = Record(layer_names=[LAYER])
    kv_cache_config = Record(kv_cache_groups=[group])
    speculator.set_attn(None, kv_cache_config, tables, None, None)
    context[LAYER].kv_cache = torch.full((BLOCKS * BLOCK,), -7)
    return Record(speculator=speculator, tables=tables, context=context, runners=kv_cache_config)


def stand_in_config(context: dict) -> Record:
    draft = Record(
        get_hidden_size=lambda: VOCAB,
        get_vocab_size=lambda: VOCAB,
        hf_config=Record(),
    )
    model = Record(
        max_model_len=LIMIT,
        dtype=torch.float32,
        head_dtype=torch.float32,
        use_fp64_gumbel=False,
        supports_multimodal_inputs=False,
    )
    speculative = Record(
        method="draft_model",
        num_speculative_tokens=3,
        draft_model_config=draft,
        use_local_argmax_reduction=False,
        enable_adaptive_verification=False,
        draft_sample_method="probabilistic",
        quantization="rollout_spec_nf4",
        kv_cache_dtype=None,
    )
    return Record(
        speculative_config=speculative,
        model_config=model,
        scheduler_config=Record(max_num_seqs=REQUESTS, max_num_batched_tokens=64),
        parallel_config=Record(
            data_parallel_size=1,
            data_parallel_rank=0,
            decode_context_parallel_size=1,
            tensor_parallel_size=1,
        ),
        compilation_config=Record(static_forward_context=context),
        additional_config={"rollout_spec": {"verifier": "rejection"}},
    )


def step(dry: Record, *requests: tuple[int, list[int], int, int], **options) -> torch.Tensor:
    """Propose after a pass in which each request (slot, verified tokens, rejected, sampled) took part: the keys of
    all its verified tokens but the last lie in the cache, and `rejected` provisional ones behind them."""
    cache = dry.context[LAYER].kv_cache
    slots = torch.tensor([slot for slot, *_ in requests], dtype=torch.int32)
    dry.tables.gather(slots)
    last = torch.zeros(REQUESTS, 1, dtype=torch.int64)
    lengths = []
    for slot, tokens, rejected, sampled in requests:
        known = tokens[: len(tokens) - (sampled > 0)]
        for place, token in enumerate([*known, *[55] * rejected]):
            cache[int(dry.tables.rows[slot, place // BLOCK]) * BLOCK + place % BLOCK] = token
        last[slot] = tokens[-1]
        lengths.append(len(known) + rejected)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    batch = Record(
        num_reqs=len(requests),
        idx_mapping=slots,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
    )
    column = [torch.tensor(x, dtype=torch.int32) for x in zip(*[(r[3], r[2]) for r in requests])]
    dry.before = cache.clone()
    return dry.speculator.propose(
        batch,
        {},
        {},
        torch.empty(0),
        None,
        column[0],
        column[1],
        last,
        torch.empty(0),
        torch.ones(REQUESTS),
        torch.zeros(REQUESTS, dtype=torch.int64),
        mm_inputs=None,
        **options,
    )


def places(dry: Record, slot: int, positions: range) -> set[int]:
    return {int(dry.tables.rows[slot, p // BLOCK]) * BLOCK + p % BLOCK for p in positions}


def written(dry: Record) -> set[int]:
    return set((dry.context[LAYER].kv_cache != dry.before).nonzero().flatten().tolist())


A, B = [5, 9, 2, 11, 30, 8, 1], [4, 4, 90]


def test_drafts_continue_the_verified_tokens(dry):
    drafts = step(dry, (2, A, 2, 1), (0, B, 0, 3), num_speculative_tokens=3)
    assert drafts[:, :3].tolist() == [continuation(A, 3), continuation(B, 3)]
    # The last verified token and the drafts but the last have keys now, and nothing else was touched.
    assert written(dry) <= places(dry, 2, range(6, 9)) | places(dry, 0, range(2, 5))
    assert dry.speculator.forwards == 3


def test_the_sampler_keeps_its_distributions_by_slot_and_step(dry):
    drafts = step(dry, (2, A, 2, 1), num_speculative_tokens=3)
    assert dry.speculator.draft_logits[2].argmax(-1).tolist() == drafts[0].tolist()
    assert not dry.speculator.draft_logits[[0, 1, 3]].any()


@pytest.mark.parametrize("count", [1, 2])
def test_a_shorter_draft_costs_that_many_forwards(dry, count):
    drafts = step(dry, (1, A, 0, 1), num_speculative_tokens=count)
    assert drafts.shape == (1, 3) and drafts[0, :count].tolist() == continuation(A, count)
    assert dry.speculator.forwards == count


def test_off_runs_nothing(dry):
    assert step(dry, (1, A, 0, 1), num_speculative_tokens=0).shape == (1, 3)
    assert dry.speculator.forwards == 0 and not written(dry)


def test_an_unfinished_prompt_is_left_alone(dry):
    drafts = step(dry, (3, A, 0, 0), (1, B, 0, 1), num_speculative_tokens=3)
    assert drafts[1].tolist() == continuation(B, 3)
    assert drafts[0].tolist() == [0, 0, 0]
    assert written(dry) <= places(dry, 1, range(2, 5))
    assert not dry.speculator.draft_logits[3].any()


def test_nothing_is_written_past_the_longest_sequence(dry):
    long = [7] * (LIMIT - 1)
    drafts = step(dry, (0, long, 0, 1), num_speculative_tokens=3)
    assert drafts[0, :2].tolist() == continuation(long, 2)
    assert written(dry) <= places(dry, 0, range(LIMIT - 2, LIMIT))


def test_a_dummy_run_writes_nothing(dry):
    step(dry, (0, A, 0, 1), dummy_run=True)
    assert dry.speculator.forwards == 3 and not written(dry)
    step(dry, (0, A, 0, 1), dummy_run=True, skip_attn_for_dummy_run=True)
    assert not written(dry)


class Graphs:
    """Stands for vLLM's manager: a graph calls what was captured again, on the buffers it was captured on."""

    def __init__(self, vllm_config, device, mode, decode_query_len) -> None:
        self.sizes, self.graphs, self.replays = (1, 2, 4), {}, []
        assert decode_query_len == 1

    @torch.inference_mode()
    def capture(self, step, model_state, buffers, tables, groups, config, progress_bar_desc) -> None:
        for rows in self.sizes:
            buffers.seq_lens[:rows] = 1
            buffers.query_start_loc[: rows + 1] = torch.arange(rows + 1)
            metadata = Record(seq_lens=buffers.seq_lens[:rows], table=tables.input_block_tables[0])
            metadata = {DRAFT: metadata}
            slots = {DRAFT: tables.slot_mappings[0, :rows]}
            arguments = rows, rows, metadata, slots, None, None
            step(*arguments)
            self.graphs[rows] = lambda arguments=arguments: step(*arguments, num_speculative_steps=3)

    def dispatch(self, batch, tokens, uniform_token_count, num_active_loras):
        from vllm.config import CUDAGraphMode

        assert (tokens, uniform_token_count, num_active_loras) == (batch, 1, 0)
        rows = next((rows for rows in self.sizes if rows >= batch and rows in self.graphs), None)
        mode = CUDAGraphMode.NONE if rows is None else CUDAGraphMode.FULL
        return Record(cg_mode=mode, num_reqs=rows)

    def run_fullgraph(self, desc) -> None:
        self.replays.append(desc.num_reqs)
        self.graphs[desc.num_reqs]()

    def release_graphs(self) -> None:
        self.graphs.clear()


class Group(str):
    """An attention group, by the name of its one layer."""

    kv_cache_group_id = 0

    def map_to_kernel_block_table(self, table: torch.Tensor) -> torch.Tensor:
        return table


@pytest.fixture
def graphed(v2, dry, monkeypatch):
    """The same with its draft steps on graphs."""
    from vllm.config import CUDAGraphMode

    if "draft_model" in v2.stock.__name__:  # before 0.32; `test_on_newest` runs these
        pytest.skip("drafting on this release's V2 runner is refused")
    monkeypatch.setattr(v2.ours, "SpeculatorCudaGraphManager", Graphs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(dry.graphs.replays))
    speculator = dry.speculator
    speculator.supports_decode_metadata_update = True
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    dry.graphs = speculator.graphs
    monkeypatch.setattr(speculator, "_update_draft_decode_metadata", lambda metadata, rows: None)
    speculator.attn_groups = [[Group(DRAFT)]]
    before = dry.context[LAYER].kv_cache.clone()
    speculator.capture()
    assert set(dry.graphs.graphs) == {1, 2, 4} and (dry.context[LAYER].kv_cache == before).all()
    return dry


def test_a_graph_drafts_what_eager_steps_draft(graphed):
    """One step per graph, K times; a batch that fills none of them is padded by rows that write nothing."""
    drafts = step(graphed, (2, A, 2, 1), (0, B, 0, 3), (3, A, 0, 0), num_speculative_tokens=3)
    assert drafts.tolist() == [continuation(A, 3), continuation(B, 3), [0, 0, 0]]
    assert graphed.graphs.replays == [4, 4, 4] and graphed.speculator.forwards == 3
    assert written(graphed) <= places(graphed, 2, range(6, 9)) | places(graphed, 0, range(2, 5))
    assert graphed.speculator.draft_logits[2].argmax(-1).tolist() == drafts[0].tolist()
    assert not graphed.speculator.draft_logits[[1, 3]].any()
    drafts = step(graphed, (1, B, 0, 1), num_speculative_tokens=2)
    assert drafts[0, :2].tolist() == continuation(B, 2) and graphed.graphs.replays[3:] == [1, 1]


def test_a_graph_writes_nothing_past_the_longest_sequence(graphed):
    long = [7] * (LIMIT - 1)
    drafts = step(graphed, (0, long, 0, 1), (1, B, 0, 1), num_speculative_tokens=3)
    assert drafts[0, :2].tolist() == continuation(long, 2) and drafts[1].tolist() == continuation(B, 3)
    assert written(graphed) <= places(graphed, 0, range(LIMIT - 2, LIMIT)) | places(graphed, 1, range(2, 5))


def test_a_step_that_leaves_the_next_ones_inputs_behind_wrongly_is_seen(graphed, monkeypatch):
    real = graphed.speculator._step

    def stuck(rows, metadata, mapping):
        real(rows, metadata, mapping)
        graphed.speculator.input_buffers.seq_lens[:rows] -= 1

    monkeypatch.setattr(graphed.speculator, "_step", stuck)
    assert step(graphed, (2, A, 2, 1), num_speculative_tokens=3)[0].tolist() != continuation(A, 3)


def test_graphs_of_a_cache_that_is_gone_do_not_run(graphed):
    cache = graphed.context[LAYER].kv_cache
    graphed.context[LAYER].kv_cache = torch.full_like(cache, -7)
    assert step(graphed, (0, A, 0, 1), num_speculative_tokens=3)[0].tolist() == continuation(A, 3)
    assert not graphed.graphs.replays and not graphed.graphs.graphs


def test_attention_that_needs_the_host_leaves_steps_eager(v2, dry, caplog):
    from vllm.config import CUDAGraphMode

    dry.speculator.supports_decode_metadata_update = False
    dry.speculator.init_cudagraph_manager(CUDAGraphMode.FULL)
    assert dry.speculator.graphs is None and "FLASH_ATTN and TRITON_ATTN can" in caplog.text
    dry.speculator.supports_decode_metadata_update = True
    dry.speculator.init_cudagraph_manager(CUDAGraphMode.PIECEWISE)  # the target has no full graphs
    assert dry.speculator.graphs is None
    dry.speculator.capture()
    assert step(dry, (0, A, 0, 1), num_speculative_tokens=3)[0].tolist() == continuation(A, 3)


def test_the_drafter_owns_no_cache(dry):
    assert dry.context[DRAFT].get_kv_cache_spec(None) is None
    assert dry.context[LAYER].get_kv_cache_spec(None) == "allocates"
    assert dry.runners.kv_cache_groups[0].layer_names == [LAYER]
    step(dry, (0, A, 0, 1))
    assert dry.context[DRAFT].kv_cache is dry.context[LAYER].kv_cache
    dry.context[LAYER].kv_cache = torch.full(
        (BLOCKS * BLOCK,), -7
    )  # the runner allocates once more after profiling
    assert step(dry, (0, A, 0, 1))[0].tolist() == continuation(A, 3)


def test_a_drafter_with_a_cache_of_its_own_is_seen(dry, monkeypatch):
    monkeypatch.setattr(type(dry.speculator), "_bind", lambda self: None)
    dry.context[DRAFT].kv_cache = torch.zeros(BLOCKS * BLOCK, dtype=torch.int64)
    assert step(dry, (0, A, 0, 1))[0].tolist() != continuation(A, 3)


def test_a_draft_one_place_off_is_seen(dry, monkeypatch):
    assert step(dry, (0, A, 1, 1))[0].tolist() == continuation(A, 3)
    tables = dry.tables.compute_slot_mappings
    monkeypatch.setattr(dry.tables, "compute_slot_mappings", lambda s, e, p, n: tables(s, e, p + 1, n))
    assert step(dry, (0, A, 1, 1))[0].tolist() != continuation(A, 3)


def test_a_drafter_that_raises_is_set_aside_and_its_guesses_are_judged_as_guesses(
    dry, v2, monkeypatch, caplog
):
    told = []
    monkeypatch.setattr(v2.ours, "set_aside", lambda config, by, aside: told.append((by, aside)))
    with monkeypatch.context() as broken:
        broken.setattr(dry.speculator.model, "forward", lambda **given: 1 / 0)
        drafts = step(dry, (2, A, 0, 1), (0, B, 0, 1), num_speculative_tokens=2)
    assert "set aside: it raised ZeroDivisionError" in caplog.text and told == [("worker", True)]
    for again in range(2):
        assert drafts[:, :2].tolist() == [[0, 0], [0, 0]], again
        q = dry.speculator.draft_logits[[2, 0], :2].softmax(-1)
        assert (q[..., 0] == 1).all()
        drafts = step(dry, (2, A, 0, 1), (0, B, 0, 1), num_speculative_tokens=2)
    assert dry.speculator.forwards == 1
    dry.speculator.revive()
    assert step(dry, (2, A, 0, 1), num_speculative_tokens=2)[0, :2].tolist() == continuation(A, 2)


def test_a_drafter_that_may_not_draft_leaves_guesses(dry, monkeypatch):
    """What stale and broken drafters meet on this runner, which must hand over as many drafts as it promised."""
    from rollout_spec.integrations.vllm.compat_v2 import watch_proposing

    allowed, failures, figures = [True], [], []
    parallel = Record(tensor_parallel_size=1)
    runner = Record(
        speculator=dry.speculator,
        execute_model=lambda output: "executed",
        vllm_config=Record(parallel_config=parallel),
    )
    with monkeypatch.context() as watched:
        watched.setattr(dry.speculator, "propose", dry.speculator.propose)
        watch_proposing(runner, lambda: allowed[0], failures.append, figures.append)
        watch_proposing(runner, lambda: False, failures.append, figures.append)  # once is enough
        assert runner.execute_model(Record(rollout_spec={"reasons": 1})) == "executed" and figures == [
            {"reasons": 1}
        ]
        assert step(dry, (2, A, 0, 1), num_speculative_tokens=2)[0, :2].tolist() == continuation(A, 2)
        allowed[0] = False
        forwards = dry.speculator.forwards
        assert step(dry, (2, A, 0, 1), num_speculative_tokens=2)[0, :2].tolist() == [0, 0]
        assert dry.speculator.forwards == forwards
        assert (dry.speculator.draft_logits[2, :2].softmax(-1)[:, 0] == 1).all()
        allowed[0] = True
        watched.setattr(dry.speculator, "_draft", lambda *given: 1 / 0)
        watched.setattr(dry.speculator, "_alone", False)  # so that it raises, as vLLM's own would
        assert step(dry, (2, A, 0, 1), num_speculative_tokens=2)[0, :2].tolist() == [0, 0]
        assert [type(error) for error in failures] == [ZeroDivisionError]


def test_a_stock_speculator_that_raises_is_not_run_at_k_0():
    """vLLM's own run their models there too, and would raise once more."""
    from rollout_spec.integrations.vllm.compat_v2 import watch_proposing

    def propose(input_batch, num_speculative_tokens):
        calls.append(num_speculative_tokens)
        raise ZeroDivisionError("on purpose")

    calls, failures, drafts = [], [], torch.full((4, 3), 7)
    speculator = Record(
        propose=propose, draft_logits=torch.zeros(4, 3, 9), draft_tokens=drafts, num_speculative_steps=3
    )
    parallel = Record(tensor_parallel_size=1)
    runner = Record(
        speculator=speculator, execute_model=lambda: None, vllm_config=Record(parallel_config=parallel)
    )
    watch_proposing(runner, lambda: not failures, failures.append, lambda figures: None)
    batch = Record(num_reqs=2, idx_mapping=torch.tensor([2, 0]))
    for count in (0, 2, 0):
        assert speculator.propose(batch, num_speculative_tokens=count).shape == (2, 3)
    assert calls == [0] and [type(error) for error in failures] == [ZeroDivisionError]
    assert drafts[:2].tolist() == [[0, 0, 7]] * 2
    parallel.tensor_parallel_size = 2
    speculator.propose = propose
    failures.clear()
    watch_proposing(runner, lambda: not failures, failures.append, lambda figures: None)
    with pytest.raises(ZeroDivisionError):
        speculator.propose(batch, num_speculative_tokens=0)


def test_nonsense_from_the_drafter_becomes_a_distribution(dry, monkeypatch):
    """Were q not a number, the verifier's residual would be none either. The canary sees it as it is."""
    logits = torch.tensor(
        [[torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf, 1.0, 2.0], [-torch.inf] * 3]
    )
    assert torch.equal(
        dry.speculator.model.compute_logits(logits.clone()).nan_to_num(7.0), logits.nan_to_num(7.0)
    )
    monkeypatch.setattr(dry.speculator, "_drafting", True)
    given = dry.speculator.model.compute_logits(logits.clone())
    assert given.softmax(-1).isfinite().all()
    assert given[2].tolist() == logits[2].tolist() and not given[[0, 1, 3]].any()


def test_drafts_of_nonsense_come_from_a_distribution(dry, monkeypatch):
    monkeypatch.setattr(
        dry.speculator.model,
        "forward",
        lambda **given: torch.full((len(given["input_ids"]), VOCAB), torch.nan),
    )
    step(dry, (2, A, 0, 1), num_speculative_tokens=2)
    assert not dry.speculator.draft_logits[2, :2].any() and not dry.speculator._drafting


@pytest.fixture
def runner(monkeypatch):
    """The V2 runner's module with the touch made, a construction that only tells of itself, and a stock speculator."""
    from vllm.v1.worker.gpu import model_runner

    from rollout_spec.integrations.vllm import compat_v2

    made: list = []
    monkeypatch.setattr(compat_v2, "refuse", lambda config: None)
    monkeypatch.setattr(model_runner, "init_speculator", lambda *given: "stock")
    monkeypatch.setattr(model_runner.GPUModelRunner, "__init__", lambda self, *given: made.append(given))
    compat_v2.rebind_init_speculator(model_runner)
    return Record(module=model_runner, made=made)


def test_the_runner_makes_the_self_drafter_where_it_is_configured(runner, v2, monkeypatch):
    monkeypatch.setattr(v2.ours.SelfSpeculator, "__init__", lambda self, config, device: None)
    config, states = stand_in_config({}), (object(),)
    assert isinstance(runner.module.init_speculator(config, "cpu", *states), v2.ours.SelfSpeculator)
    config.speculative_config.quantization = None
    assert runner.module.init_speculator(config, "cpu", *states) == "stock"
    config.speculative_config.quantization, config.additional_config = "rollout_spec_nf4", {}
    assert runner.module.init_speculator(config, "cpu", *states) == "stock"


def test_what_the_v2_runner_cannot_do_is_refused_at_start(runner, v2):
    from rollout_spec.contracts import InvalidRequest

    config = stand_in_config({})
    takes_k = "num_speculative_tokens" in inspect.signature(v2.base.BaseSpeculator.propose).parameters
    if takes_k:
        runner.module.GPUModelRunner(config, "cpu")
        assert runner.made == [(config, "cpu")]
    else:
        with pytest.raises(InvalidRequest, match=r"drafts at one length only; install vllm>=0\.32"):
            runner.module.GPUModelRunner(config, "cpu")
    config.additional_config = {"rollout_spec": {"verifier": "coupled"}}
    with pytest.raises(InvalidRequest, match=r"verifier='coupled'.*VLLM_USE_V2_MODEL_RUNNER=0"):
        runner.module.GPUModelRunner(config, "cpu")
    config.additional_config, before = {}, len(runner.made)
    runner.module.GPUModelRunner(config, "cpu")
    assert len(runner.made) == before + 1


def test_hidden_states_are_refused_rather_than_never_seen(runner, v2, monkeypatch):
    from rollout_spec.contracts import InvalidRequest
    from rollout_spec.integrations.vllm import compat_v2, hidden_states

    monkeypatch.setattr(compat_v2, "refuse_v2", lambda config, module: None)
    refused = pytest.raises(InvalidRequest, match=r"capture='print'.*VLLM_USE_V2_MODEL_RUNNER=0")
    config = stand_in_config({})
    stop = hidden_states.capture(print)
    with refused:
        runner.module.GPUModelRunner(config, "cpu")
    stop()
    made = runner.module.GPUModelRunner(config, "cpu")
    with refused:
        hidden_states.capture(print)
    del made
    hidden_states.capture(print)()


@pytest.mark.skipif("ROLLOUT_SPEC_DRY" in os.environ, reason="this is the run over the newest release")
def test_on_newest(released_vllm):
    folder = released_vllm("0.33.0")
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "ROLLOUT_SPEC_DRY": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_PLUGINS": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "integration", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed, 1 skipped" in done.stdout
