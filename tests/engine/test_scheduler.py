"""Block pool, slots and scheduler with a make-believe forward: who owns what, who comes next, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec import SamplingParams
from rollout_spec.contracts import FinishReason
from rollout_spec.torch_backend.kv_cache import BlockPool, OutOfBlocks
from rollout_spec.torch_backend.scheduler import Scheduler
from rollout_spec.torch_backend.slots import Sample, Slots

BLOCK, CONTEXT, END = 4, 40, 9


class World:
    """A scheduler whose forward only checks: what each cache entry holds is a tuple of the tokens up to it."""

    def __init__(self, blocks=12, slots=4, chunk=6):
        self.pool = BlockPool(blocks)
        self.slots = Slots(slots, CONTEXT, BLOCK, scratch_block=blocks)
        self.scheduler = Scheduler(self.slots, self.pool, chunk, self.copy_block, self.released)
        self.content = [[None] * BLOCK for _ in range(blocks)]
        self.assigned, self.limit = set(), min(CONTEXT, blocks * BLOCK)
        self.chunk, self.admissions, self.prefilled, self.steps = chunk, [], 0, 0

    def copy_block(self, source, destination):
        self.content[destination] = list(self.content[source])

    def released(self, slot, sample, freed):
        self.assigned.remove(slot)

    def submit(self, tokens, n=1, length=8):
        prompt = self.scheduler.prompt(np.asarray(tokens, np.int64))
        limit = min(self.limit, len(tokens) + length)
        group = [Sample("r", i, prompt, SamplingParams(), 0, limit, (END,)) for i in range(n)]
        for sample in group:
            self.scheduler.submit(sample)
        return group

    def place(self, slot, position):
        return self.slots.tables[slot, position // BLOCK], position % BLOCK

    def write(self, slot, position):
        block, offset = self.place(slot, position)
        assert block < self.pool.num_blocks, "a write past the sequence's own blocks"
        self.content[block][offset] = tuple(self.slots.tokens[slot, : position + 1].tolist())

    def reads(self, slot, position):
        """The entries before `position` are those of this very sequence."""
        for p in range(position):
            block, offset = self.place(slot, p)
            assert self.content[block][offset] == tuple(self.slots.tokens[slot, : p + 1].tolist())

    def step(self, draft_lengths=None, next_token=lambda slot: 5):
        """One step of the backend; returns the samples that finished."""
        self.steps += 1
        for sample in self.scheduler.admit():
            self.assigned.add(sample.slot)
            self.admissions.append(sample)
        self.check()
        chunks = self.scheduler.prefills()
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= self.chunk
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.start == self.slots.computed[chunk.slot] < chunk.stop < self.slots.length[chunk.slot]
            self.reads(chunk.slot, chunk.start)
            for position in range(chunk.start, chunk.stop):
                self.write(chunk.slot, position)
            self.prefilled += chunk.stop - chunk.start
            self.scheduler.prefilled(chunk)
        rows = self.scheduler.ready()
        drafts = np.zeros(len(rows), np.int64) if draft_lengths is None else draft_lengths(len(rows))
        drafts = np.minimum(drafts, self.slots.limit[rows] - self.slots.length[rows] - 1)
        kept = self.scheduler.reserve(rows, drafts)
        oldest = self.scheduler.running[:1]
        rows, drafts = rows[kept], drafts[kept]
        assert all(self.slots.samples[slot] is not None for slot in rows)
        assert oldest == self.scheduler.running[:1], "the oldest sequence is never preempted"
        self.check()
        if not len(rows):
            return []
        for slot, k in zip(rows.tolist(), drafts.tolist()):
            length = int(self.slots.length[slot])
            assert length + k <= self.slots.num_blocks[slot] * BLOCK, "lookahead is reserved"
            self.reads(slot, length - 1)
            for position in range(length - 1, length + k):
                block, offset = self.place(slot, position)
                assert block < self.pool.num_blocks
                self.content[block][offset] = "draft"
        tokens = np.array([[next_token(slot) for _ in range(int(drafts.max()) + 1)] for slot in rows])
        emitted = 1 + (drafts * 0.7).astype(np.int64)
        logprobs = np.zeros((3, *tokens.shape), np.float32)
        before = self.slots.length[rows].copy()
        appended = self.slots.append(rows, tokens, emitted, logprobs)
        for slot, start in zip(rows.tolist(), before.tolist()):
            for position in range(start - 1, int(self.slots.length[slot]) - 1):
                self.write(slot, position)  # the pass has computed all that was accepted
        finished = []
        for slot, count in zip(rows.tolist(), appended.tolist()):
            if count < 0 or self.slots.length[slot] >= self.slots.limit[slot]:
                sample = self.scheduler.release(slot)
                sample.finish_reason = FinishReason.STOP if count < 0 else FinishReason.LENGTH
                finished.append(sample)
        self.check()
        return finished

    def abort(self, sample):
        if sample.finish_reason is None:
            if sample.slot is None:
                self.scheduler.withdraw(sample)
            else:
                self.scheduler.release(sample.slot)
            sample.finish_reason = FinishReason.ABORT
        self.check()

    def update(self):
        self.scheduler.preempt_all()
        self.content = [[None] * BLOCK for _ in self.content]
        self.check()
        assert self.pool.available == self.pool.num_blocks

    def check(self):
        """Every block has as many owners as tables and kept prompts hold it; every sample is in one place."""
        scheduler, slots = self.scheduler, self.slots
        owners = np.zeros(self.pool.num_blocks, np.int64)
        for slot in scheduler.running:
            blocks = slots.tables[slot, : slots.num_blocks[slot]].tolist()
            assert len(set(blocks)) == len(blocks)
            assert (slots.tables[slot, slots.num_blocks[slot] :] == slots.scratch_block).all()
            owners[blocks] += 1
            sample = slots.samples[slot]
            own_from = (len(sample.prompt.tokens) - 1) // BLOCK
            for other in scheduler.running:
                shared = set(blocks[own_from:]) & set(slots.tables[other, : slots.num_blocks[other]].tolist())
                assert other == slot or not shared, "a block that is written belongs to one sequence"
            assert sample.slot == slot and slots.computed[slot] <= slots.length[slot] - 1 < slots.limit[slot]
        for prompt in scheduler._keeping:
            assert prompt.waiting > 0
            owners[prompt.blocks] += 1
        assert owners.tolist() == self.pool._owners.tolist()
        assert sorted(self.pool._free) == np.flatnonzero(owners == 0).tolist()
        idle = [slot for slot, sample in enumerate(slots.samples) if sample is None]
        assert sorted(slots._free) == idle and sorted([*idle, *scheduler.running]) == list(
            range(slots.capacity)
        )
        assert not any(slots.num_blocks[slot] for slot in idle)
        waiting = {}
        for sample in scheduler.waiting:
            assert sample.slot is None and sample.finish_reason is None
            waiting[sample.prompt] = waiting.get(sample.prompt, 0) + 1
        assert all(prompt.waiting == count for prompt, count in waiting.items())
        assert set(scheduler._keeping) <= set(waiting)
        leaders = [p.leader for p in waiting if p.leader is not None]
        assert all(leader.slot in scheduler.running for leader in leaders)

    def finish(self, samples, **options):
        """Step until all are done; the bound on steps is what no starvation means."""
        bound = self.steps + 60 * (len(samples) + 1)
        while any(sample.finish_reason is None for sample in samples):
            self.step(**options)
            assert self.steps < bound, "somebody starves"
        self.empty()

    def empty(self):
        scheduler = self.scheduler
        assert (
            not scheduler.waiting
            and not scheduler.running
            and not scheduler._keeping
            and not scheduler._prompts
        )
        assert self.pool.available == self.pool.num_blocks and self.slots.free_count == self.slots.capacity


# --- the pool ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 5)), max_size=60))
def test_the_pool_counts_owners(moves):
    pool, held = BlockPool(8), []
    for move, number in moves:
        if move == "allocate":
            free = 8 - len({block for blocks in held for block in blocks})
            if number > free:
                with pytest.raises(OutOfBlocks, match=f"{number} blocks wanted, {free} of 8 free"):
                    pool.allocate(number)
            else:
                blocks = pool.allocate(number)
                assert len(set(blocks)) == number and not any(set(blocks) & set(other) for other in held)
                held.append(blocks)
        elif held and move == "share":
            pool.share(held[number % len(held)])
            held.append(held[number % len(held)])
        elif held:
            pool.free(held.pop(number % len(held)))
        assert pool.available == 8 - len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.free(blocks)
    assert pool.available == 8


def test_the_pool_refuses_to_free_or_share_what_is_free():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    for misuse in (pool.free, pool.share):
        with pytest.raises(AssertionError, match="free block"):
            misuse(blocks)


# --- slots ------------------------------------------------------------------------------------------------


def test_append_stops_at_the_first_end_token_and_grows():
    world = World(blocks=40, slots=3)
    (one,), (two,), (three,) = (world.submit([2] * k, length=30) for k in (1, 2, 3))
    for sample in world.scheduler.admit():
        world.assigned.add(sample.slot)
    rows = np.array([one.slot, two.slot, three.slot])
    tokens = np.array([[5, END, 6, END], [END, 6, 6, 6], [6, 7, 8, END]])
    logprobs = np.arange(36, dtype=np.float32).reshape(3, 3, 4)
    appended = world.slots.append(rows, tokens, np.array([4, 3, 3]), logprobs)
    assert appended.tolist() == [-2, -1, 3]  # the fourth token of the last row was not emitted
    for sample, output in ((one, [5, END]), (two, [END]), (three, [6, 7, 8])):
        row = rows.tolist().index(sample.slot)
        assert world.slots.computed[sample.slot] == world.slots.length[sample.slot] - 1
        world.scheduler.release(sample.slot)
        assert sample.output.tolist() == output
        assert sample.logprobs.tolist() == logprobs[:, row, : len(output)].tolist()


def test_a_preempted_sample_keeps_what_it_had():
    world = World()
    (sample,) = world.submit([1, 2, 3], length=20)
    for _ in range(4):
        world.step()
    slot = sample.slot
    world.slots.spec[slot] = [1, 2, 3, 4]
    world.scheduler.preempt(slot)
    assert sample.slot is None and sample.output.tolist() == [5] * 4 and world.scheduler.preemptions == 1
    world.step()
    assert world.slots.spec[sample.slot].tolist() == [1, 2, 3, 4]
    world.finish([sample])
    assert sample.output.tolist() == [5] * 20


# --- sharing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 14))
def test_siblings_wait_for_one_prefill_and_share_full_blocks(length):
    world = World(blocks=60, slots=8, chunk=5)
    group = world.submit(range(10, 10 + length), n=6, length=3)
    while len(world.scheduler.running) < 6:
        world.step()
    tables = [world.slots.tables[s.slot, : world.slots.num_blocks[s.slot]].tolist() for s in group]
    full = (length - 1) // BLOCK
    assert all(table[:full] == tables[0][:full] for table in tables)
    assert len({block for table in tables for block in table[full:]}) == sum(len(t) - full for t in tables)
    world.finish(group)
    assert world.prefilled == length - 1


def test_other_requests_pass_siblings_that_wait_for_their_leader():
    world = World(blocks=60, slots=8, chunk=4)
    group, (other,) = world.submit(range(20), n=3), world.submit([3, 4])
    world.step()
    assert [s.slot is not None for s in (*group, other)] == [True, False, False, True]
    assert list(world.scheduler.waiting) == group[1:]
    world.finish([*group, other])
    assert world.admissions == [group[0], other, *group[1:]]


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_a_leader_that_goes_mid_prefill_is_replaced(how):
    world = World(blocks=60, slots=8, chunk=4)
    group = world.submit(range(20), n=3)
    world.step()
    assert group[0].prompt.leader is group[0] and 0 < world.slots.computed[group[0].slot] < 19
    if how == "abort":
        world.abort(group[0])
    else:
        world.scheduler.preempt(group[0].slot)
    assert group[0].prompt.leader is None
    world.step()
    assert group[0].prompt.leader is group[how == "abort"]
    world.finish(group)
    assert world.prefilled == 4 + 19


def test_kept_prompts_are_given_up_before_a_sequence_is_preempted():
    """The second sample copied the prompt's partial block, which is kept for the third: one block too many."""
    world = World(blocks=6, slots=1, chunk=40)
    group = world.submit(range(11), n=3, length=13)
    world.finish(group)
    assert world.scheduler.preemptions == 0
    assert world.prefilled == 20  # the prompt, for the first and for the third


def test_a_prompt_seen_again_while_an_old_sample_of_it_is_preempted():
    """Two records of one prompt at a time: each keeps its own count."""
    world = World(blocks=20, slots=4, chunk=40)
    (old,) = world.submit(range(9), length=9)
    world.step()
    new = world.submit(range(9), n=2, length=9)
    assert new[0].prompt is not old.prompt
    world.scheduler.preempt(old.slot)
    world.check()
    world.finish([old, *new])


# --- order, preemption, progress --------------------------------------------------------------------------


def test_admission_is_in_order_of_submission():
    world = World(blocks=8, slots=2)
    samples = [world.submit([k, k + 1], length=1 + k % 5)[0] for k in range(12)]
    world.finish(samples)
    assert world.admissions == samples and world.scheduler.preemptions == 0


def test_a_large_request_is_not_overtaken_for_ever():
    """The head of the queue waits for blocks; small ones behind it wait with it."""
    world = World(blocks=8, slots=4)
    small = world.submit([1], length=20)
    world.step()
    (large,) = world.submit(range(26), length=2)
    late = [world.submit([k], length=3)[0] for k in range(2, 8)]
    world.finish([*small, large, *late])
    assert world.admissions[:2] == [small[0], large]


def test_the_sample_admitted_last_is_preempted_and_comes_back_first():
    world = World(blocks=6, slots=3, chunk=40)
    samples = [world.submit([k] * 7, length=12)[0] for k in range(3)]
    waiting = world.submit([8, 8], length=2)[0]
    while not world.scheduler.preemptions:
        world.step()
    assert samples[0].slot is not None and samples[2].slot is None
    assert world.scheduler.waiting[0] in samples and world.scheduler.waiting[-1] is waiting
    world.finish([*samples, waiting])
    assert all(sample.output.tolist() == [5] * 12 for sample in samples)


def test_reserve_may_preempt_a_slot_of_its_own_batch_even_the_one_it_serves():
    world = World(blocks=5, slots=2, chunk=40)
    one, two = (world.submit([k] * 7, length=12)[0] for k in range(2))
    world.scheduler.admit()
    world.assigned |= {one.slot, two.slot}
    for chunk in world.scheduler.prefills():
        world.scheduler.prefilled(chunk)
    rows, pool = world.scheduler.ready(), world.pool
    assert pool.available == 1
    slots = rows.copy()
    kept = world.scheduler.reserve(
        rows, np.array([5, 0])
    )  # 7 + 5 tokens: one more block than it has, and it is free
    assert kept.tolist() == [True, True] and pool.available == 0
    kept = world.scheduler.reserve(rows, np.array([5, 5]))  # now the second needs one: it preempts itself
    assert kept.tolist() == [True, False] and world.scheduler.running == [slots[0]]
    assert world.scheduler.waiting[0] is two and pool.available == 2
    world.check()
    kept = world.scheduler.reserve(rows[:1], np.array([9]))
    assert kept.tolist() == [True]
    for row in (0, 1):
        assert (world.slots.samples[slots[row]] is None) == (row == 1)


def test_preempt_all_keeps_the_order():
    world = World(blocks=30, slots=4)
    samples = [world.submit([k], length=9)[0] for k in range(6)]
    world.step()
    world.update()
    assert list(world.scheduler.waiting) == samples
    world.finish(samples)


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_one_sequence_may_fill_the_whole_cache(blocks):
    world = World(blocks=blocks, slots=3)
    samples = world.submit([1, 2, 3], n=3, length=100)
    world.finish(samples, draft_lengths=lambda count: np.full(count, 7))
    assert all(len(sample.output) == blocks * BLOCK - 3 for sample in samples)


@settings(max_examples=150)
@given(
    blocks=st.integers(4, 20), slots=st.integers(1, 5), chunk=st.integers(1, 12), seed=st.integers(0, 10**6),
    rates=st.tuples(*[st.sampled_from([0.0, 0.05, 0.3])] * 3),
)  # fmt: skip
def test_whatever_happens_every_sample_finishes(blocks, slots, chunk, seed, rates):
    """Random prompts (shared, nested, single tokens), lengths, K, aborts, updates and preemptions."""
    world, rng, samples = World(blocks, slots, chunk), np.random.default_rng(seed), []
    longest = min(world.limit - 2, 24)
    base = rng.integers(1, 8, longest).tolist()

    def next_token(slot):
        return END if rng.random() < 0.05 else int(rng.integers(0, 9))

    def draft_lengths(count):
        return rng.integers(0, 6, count)

    for _ in range(25):
        if rng.random() < 0.5:
            prompt = base[: int(rng.integers(1, longest + 1))] if rng.random() < 0.5 else base
            samples += world.submit(prompt, int(rng.integers(1, 5)), int(rng.integers(1, 30)))
        for happens, act in zip(rates, ("abort", "update", "preempt")):
            if rng.random() < happens and samples:
                if act == "abort":
                    world.abort(samples[int(rng.integers(len(samples)))])
                elif act == "update":
                    world.update()
                elif world.scheduler.running:
                    world.scheduler.preempt(int(rng.choice(world.scheduler.running)))
        world.step(draft_lengths, next_token)
    world.finish(samples, draft_lengths=draft_lengths, next_token=next_token)
    for sample in samples:
        total, ended = len(sample.prompt.tokens) + len(sample.output), END in sample.output
        assert total <= sample.limit and END not in sample.output[:-1]
        if sample.finish_reason is FinishReason.STOP:
            assert ended
        elif sample.finish_reason is FinishReason.LENGTH:
            assert total == sample.limit and not ended
