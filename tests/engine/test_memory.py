"""Every write lands in the request's own blocks; blocks are shared, bounded, waited for and given back."""

import asyncio

import numpy as np
import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.policy.baselines import Fixed, RandomLengths
from rollout_spec.torch_backend.kv_cache import KVCache
from rollout_spec.torch_backend.scheduler import Scheduler

from .conftest import DRAFTER, VOCAB

SENTINEL = 37.5


class Watch:
    """Checks every write to an engine's cache against who owns what, by comparing the cache before and after it.

    A token's entry (block, offset) may be written only for a sequence that has the block in its table, at a
    position that is not computed yet, and only if no other sequence has that block. Blocks without owner are
    filled with a sentinel before each step, and must still hold it after.
    """

    def __init__(self, engine):
        backend = engine.backend
        self.backend, self.cache, self.pool, self.slots = backend, backend.cache, backend.pool, backend.slots
        self.writes = self.prefilled = self.most_used = 0
        self.fresh = set()
        blocks = torch.arange(self.cache.num_blocks + 1).repeat_interleave(self.cache.block_size)
        offsets = torch.arange(self.cache.block_size).repeat(self.cache.num_blocks + 1)
        self.places = self.cache.rows(blocks, offsets).view(
            self.cache.num_blocks + 1, self.cache.block_size, -1
        )
        for owner, name in (
            (self.cache, "store"), (self.cache, "copy_block"), (self.pool, "allocate"), (backend.runner, "block"),
            (backend.runner, "prefill"), (backend, "step"),
        ):  # fmt: skip
            setattr(owner, name, self._around(getattr(self, name), getattr(owner, name)))

    @staticmethod
    def _around(watched, call):
        return lambda *arguments: watched(call, *arguments)

    def entries(self):
        """Everything stored for each token's place `[blocks + 1, block_size, ...]`."""
        flat = torch.stack((self.cache.keys, self.cache.values)).flatten(0, 1)
        return flat.view(len(flat), -1, self.cache.head_dim).transpose(0, 1)[self.places]

    def changed(self, before):
        return (self.entries() != before).flatten(2).any(-1)[: self.cache.num_blocks].nonzero().tolist()

    def free_blocks(self):
        return np.flatnonzero(self.pool._owners == 0).tolist()

    def owners(self, block):
        """(slot, place in its table) of every running sequence that has `block`."""
        running = self.backend.scheduler.running
        tables = [self.slots.tables[slot, : self.slots.num_blocks[slot]].tolist() for slot in running]
        return [(slot, table.index(block)) for slot, table in zip(running, tables) if block in table]

    def store(self, call, layer, rows, keys, values):
        before = self.entries()
        call(layer, rows, keys, values)
        for block, offset in self.changed(before):
            owners = self.owners(block)
            assert len(owners) == 1, f"block {block} was written and is in the tables of {owners}"
            ((slot, place),) = owners
            position = place * self.cache.block_size + offset
            assert position >= self.slots.computed[slot], (
                f"position {position} of slot {slot} was overwritten"
            )
            self.writes += 1

    def copy_block(self, call, source, destination):
        before = self.entries()
        call(source, destination)
        assert {block for block, _ in self.changed(before)} <= {destination}
        assert self.pool._owners[source] > 0 and self.pool._owners[destination] == 1
        assert not self.owners(destination)

    def allocate(self, call, count):
        blocks = call(count)
        self.fresh |= set(blocks)
        self.most_used = max(self.most_used, self.pool.num_blocks - self.pool.available)
        return blocks

    def block(self, call, slots, rows, draft_lengths):
        room = slots.num_blocks[rows] * self.cache.block_size
        assert (slots.length[rows] + draft_lengths <= room).all(), "lookahead is not reserved"
        assert (slots.length[rows] + draft_lengths < slots.limit[rows]).all(), "lookahead passes the limit"
        return call(slots, rows, draft_lengths)

    def prefill(self, call, slots, chunks):
        self.prefilled += sum(chunk.stop - chunk.start for chunk in chunks)
        return call(slots, chunks)

    def step(self, call):
        self.fresh = set()
        untouched = self.free_blocks()
        self.fill(untouched)
        finished = call()
        still = [block for block in untouched if block not in self.fresh]
        assert (self.entries()[still] == SENTINEL).all(), "a free block was written"
        assert self.pool.available == len(self.free_blocks()) == len(set(self.pool._free))
        return finished

    def fill(self, blocks):
        rows = self.places[blocks].flatten()
        for tensor in (self.cache.keys, self.cache.values):
            for layer in tensor:
                layer.view(-1, self.cache.head_dim).index_fill_(0, rows, SENTINEL)


def submit(engine, prompts, params, ids):
    with engine._changed:
        groups = engine._submit(*engine._reader.read(prompts, params, None, None, ids))
    return [sample for group in groups for sample in group]


def random_prompts(rng, count):
    base = rng.integers(2, VOCAB, 40).tolist()
    return [base[: rng.integers(1, 40)] if rng.random() < 0.7 else base[:33] for _ in range(count)]


def everything_is_free(engine):
    stats = engine.stats()
    assert stats.live == stats.waiting == 0 and stats.kv_tokens_free == stats.kv_tokens
    assert (
        not engine._live and not engine.backend.scheduler._keeping and not engine.backend.scheduler._prompts
    )


@pytest.fixture(scope="module")
def plain(make_engine):
    return make_engine(speculation="none", max_model_len=80)


def drive(engine, seed, calls=4):
    """Groups come, are decoded with random K, some are aborted, until all are done; returns what finished."""
    rng = np.random.default_rng(seed)
    engine.backend.policy = RandomLengths(seed, longest=9)
    asked = {}
    for call in range(calls):
        prompts = random_prompts(rng, 3)
        ids = [f"{call}-{row}" for row in range(3)]
        params = [
            SamplingParams(n=int(rng.integers(1, 4)), max_tokens=int(rng.integers(1, 40))) for _ in prompts
        ]
        submit(engine, prompts, params, ids)
        asked |= {i: (p, s, engine._live[i][:]) for i, p, s in zip(ids, prompts, params)}
        for _ in range(int(rng.integers(1, 12))):
            engine._advance()
        if engine._live and rng.random() < 0.6:
            engine.abort([str(rng.choice(list(engine._live)))])
    while engine.backend.has_work:
        engine._advance()
    return asked


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize("seed", range(4))
def test_no_write_lands_outside_a_requests_own_blocks(make_engine, plain, verifier, seed):
    shape = [
        {"kv_cache_tokens": 160, "max_num_seqs": 6}, {"kv_cache_tokens": 96, "max_num_seqs": 4, "prefill_chunk": 7},
        {"kv_cache_tokens": 800, "max_num_seqs": 16}, {"kv_cache_tokens": 80, "max_num_seqs": 8, "prefill_chunk": 3},
    ][seed]  # fmt: skip
    engine = make_engine(speculation={"drafter": DRAFTER, "verifier": verifier}, max_model_len=80, **shape)
    watch = Watch(engine)
    asked = drive(engine, seed)
    everything_is_free(engine)
    assert watch.writes > 500 and watch.most_used <= watch.pool.num_blocks
    assert (engine.stats().preemptions > 0) == (seed != 2)
    for request_id, (prompt, params, samples) in asked.items():
        whole = plain.generate([prompt], params, request_ids=[request_id])
        for sample, expected in zip(samples, whole, strict=True):
            if verifier == "coupled":
                assert sample.output.tolist() == expected.token_ids[: len(sample.output)]
                assert sample.finish_reason == "abort" or len(sample.output) == len(expected.token_ids)


def off_by_one_block(monkeypatch):
    at = KVCache.at

    def shifted(self, tables, positions, inside):
        return at(self, (tables + 1) % self.num_blocks, positions, inside)

    monkeypatch.setattr(KVCache, "at", shifted)


def one_position_early(monkeypatch):
    at = KVCache.at

    def early(self, tables, positions, inside):
        return at(self, tables, (positions - 1).clip(0), inside)

    monkeypatch.setattr(KVCache, "at", early)


def nothing_reserved(monkeypatch):
    monkeypatch.setattr(Scheduler, "reserve", lambda self, slots, draft_lengths: np.ones(len(slots), bool))


def no_lookahead(monkeypatch):
    reserve = Scheduler.reserve
    monkeypatch.setattr(Scheduler, "reserve", lambda self, slots, drafts: reserve(self, slots, 0 * drafts))


def partial_block_shared(monkeypatch):
    def blocks_for(self, sample):
        prompt, total = sample.prompt, -(-(sample.length + 1) // self.slots.block_size)
        if prompt.blocks is None:
            return self.pool.allocate(total), 0
        self.pool.share(prompt.blocks)
        return prompt.blocks + self.pool.allocate(total - len(prompt.blocks)), len(prompt.tokens) - 1

    monkeypatch.setattr(Scheduler, "_blocks_for", blocks_for)


def freed_too_early(monkeypatch):
    prefilled = Scheduler.prefilled

    def and_free(self, chunk):
        prefilled(self, chunk)
        last = self.slots.tables[chunk.slot, : self.slots.num_blocks[chunk.slot]].tolist()[-1:]
        if self.pool._owners[last[0]] == 1:
            self.pool.free(last)

    monkeypatch.setattr(Scheduler, "prefilled", and_free)


FAULTS = [
    (off_by_one_block, "in the tables of|overwritten|free block"),
    (one_position_early, "overwritten"),
    (nothing_reserved, "lookahead is not reserved"),
    (no_lookahead, "lookahead is not reserved"),
    (partial_block_shared, "in the tables of"),
    (freed_too_early, "in the tables of|free block|freeing a free block|copy"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_the_watch_sees_a_fault(make_engine, monkeypatch, fault, words):
    """The proof above is worth something: each of these bugs is caught."""
    engine = make_engine(kv_cache_tokens=320, max_model_len=80, max_num_seqs=6)
    Watch(engine)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=words):
        drive(engine, 0)


# --- sharing ----------------------------------------------------------------------------------------------


def one_prompt(length=50):
    return np.random.default_rng(length).integers(2, VOCAB, length).tolist()


@pytest.mark.parametrize("apart", [False, True], ids=["one request", "separate requests"])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 50])
def test_a_group_prefills_its_prompt_once_and_shares_its_blocks(make_engine, plain, length, apart):
    n, prompt = 8, one_prompt(length)
    engine = make_engine(max_model_len=80, max_num_seqs=8)
    watch = Watch(engine)
    ids = [f"sibling {row}" for row in range(n)] if apart else ["group"]
    params = SamplingParams(n=1 if apart else n, max_tokens=20, ignore_eos=True)
    engine.backend.policy = Fixed(1)
    samples = submit(engine, [prompt] * len(ids), params, ids)
    while len(engine.backend.scheduler.running) < n:
        engine._advance()
    used = watch.pool.num_blocks - watch.pool.available
    assert used <= (length - 1) // 16 + 2 * n
    assert used == len(
        {b for slot in range(n) for b in watch.slots.tables[slot, : watch.slots.num_blocks[slot]]}
    )
    while engine.backend.has_work:
        engine._advance()
    assert watch.prefilled == length - 1
    everything_is_free(engine)
    whole = plain.generate([prompt] * len(ids), params, request_ids=ids)
    assert [sample.output.tolist() for sample in samples] == [c.token_ids for c in whole]


def test_a_long_prompt_is_held_once(make_engine):
    """64 samples of a prompt of 12 blocks would need 832 blocks; the cache has 12 + 64 + a few."""
    engine = make_engine(kv_cache_tokens=16 * 80, max_num_seqs=64)
    watch = Watch(engine)
    params = SamplingParams(n=64, max_tokens=10, ignore_eos=True)
    assert len(engine.generate([one_prompt(193)], params)) == 64
    assert engine.stats().preemptions == 0 and watch.prefilled == 192
    assert watch.most_used <= 12 + 64
    everything_is_free(engine)


def test_sharing_outlives_the_sample_that_computed_the_prompt(make_engine, plain):
    """The first sample ends while others still wait for a slot; they go on from the blocks kept for them."""
    engine = make_engine(max_model_len=80, max_num_seqs=2)
    watch = Watch(engine)
    params = SamplingParams(n=7, max_tokens=3, ignore_eos=True)
    found = engine.generate([one_prompt()], params, request_ids=["x"])
    assert watch.prefilled == 49
    assert [c.token_ids for c in found] == [
        c.token_ids for c in plain.generate([one_prompt()], params, request_ids=["x"])
    ]
    everything_is_free(engine)


# --- the bound, waiting, giving back ----------------------------------------------------------------------


def test_memory_is_bounded_and_everybody_gets_a_turn(make_engine, plain):
    engine = make_engine(max_model_len=80, max_num_seqs=16, kv_cache_tokens=80)
    watch = Watch(engine)
    nbytes, prompts = engine.backend.cache.nbytes, [one_prompt(length) for length in range(1, 40, 3)]
    params = SamplingParams(n=2, max_tokens=36, ignore_eos=True)
    ids = [str(row) for row in range(len(prompts))]
    found = engine.generate(prompts, params, request_ids=ids)
    assert [c.token_ids for c in found] == [
        c.token_ids for c in plain.generate(prompts, params, request_ids=ids)
    ]
    assert watch.most_used <= watch.pool.num_blocks == 5 and engine.backend.cache.nbytes == nbytes
    assert engine.stats().preemptions > 0
    everything_is_free(engine)


def test_whatever_ends_a_request_gives_its_blocks_back(make_engine):
    engine = make_engine(max_num_seqs=4, kv_cache_tokens=512)
    Watch(engine)
    prompt = one_prompt(20)
    (whole,) = engine.generate([prompt], SamplingParams(max_tokens=40, ignore_eos=True), request_ids=["x"])
    stop = SamplingParams(max_tokens=40, ignore_eos=True, stop=[whole.text[9:12]])
    engine.generate([prompt], stop, n=3, request_ids=["x"])
    everything_is_free(engine)

    samples = submit(
        engine, [prompt, prompt, one_prompt(60)], SamplingParams(n=3, max_tokens=50), ["a", "b", "c"]
    )
    for step in range(4):
        engine._advance()
        engine.abort([["b"], ["a"], [], ["c"]][step])
    everything_is_free(engine)
    assert all(sample.finish_reason == "abort" for sample in samples)

    async def close_early(steps):
        stream = engine.stream(prompt, SamplingParams(n=6, max_tokens=60))
        waiting = asyncio.ensure_future(anext(stream))
        for _ in range(steps):
            await asyncio.sleep(0.002)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()

    for steps in (0, 1, 5):
        asyncio.run(close_early(steps))
        everything_is_free(engine)

    samples = submit(engine, [prompt], SamplingParams(n=3, max_tokens=50), ["a"])
    engine._advance()
    engine.sleep()
    engine.wake_up()
    engine.abort()
    everything_is_free(engine)


def test_an_error_in_a_step_gives_everything_back(make_engine, monkeypatch, prompts):
    engine = make_engine()
    before = engine.generate(prompts, SamplingParams(max_tokens=9), request_ids=list("abcdef"))
    for owner, name in ((engine.backend.runner, "prefill"), (engine.backend.runner, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *arguments, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.generate(prompts, SamplingParams(n=2, max_tokens=9), request_ids=list("abcdef"))
        everything_is_free(engine)
    (report,) = engine.stats().reports  # the drafter shares the forward that failed
    assert report.cause == "raised"
    after = engine.generate(prompts, SamplingParams(max_tokens=9), request_ids=list("abcdef"))
    assert [c.token_ids for c in after] == [c.token_ids for c in before]
