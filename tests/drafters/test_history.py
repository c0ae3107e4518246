"""History: right proposals (against brute force), who sees whose text, bounded memory, honest confidence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec.drafters import history, texts
from rollout_spec.drafters.history import EPOCHS, OWN, SIBLINGS, History
from rollout_spec.drafters.lookup import BUCKET

END = 99


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def emit(h: History, slot: int, *tokens: int) -> None:
    h.extend(ids(slot), ids(*tokens)[None], ids(len(tokens)))


def proposed(h: History, slot: int, limit: int = 8) -> list[int]:
    matches = h.match(ids(slot), ids(limit))
    return h.propose(ids(slot), matches.lengths)[0].tolist()


def answer(h: History, slot: int, prompt: np.ndarray, *tokens: int, keep: bool = True) -> None:
    h.begin(slot, prompt)
    for token in tokens:
        h.match(ids(slot), ids(4))
        emit(h, slot, token)
    h.finish(slot, keep)


class Exact(History):
    """Without hash collisions."""

    def _entries(self, index, salt):
        self.seen = getattr(self, "seen", {})
        tokens = self._texts.tokens
        rows = [
            [
                self.seen.setdefault((group, *tokens[end - n : end].tolist()), len(self.seen))
                for n in self.orders
            ]
            for group, end in zip(salt.tolist(), index.tolist())
        ]
        return np.array(rows, np.int64).reshape(-1, len(self.orders))


class Colliding(History):
    """With next to nothing but hash collisions."""

    def _entries(self, index, salt):
        return super()._entries(index, salt) & 3


def test_slots_that_do_not_exist_are_refused():
    h = History(max_tokens=1000)
    with pytest.raises(IndexError):
        h.match(ids(1_000_000), ids(4))
    with pytest.raises(IndexError):
        emit(h, 1_000_000, 1, 2)


def test_sequences_may_come_in_another_order():
    h = History(max_tokens=1000)
    for slot in (0, 1):
        h.begin(slot, ids(1, 2), group=slot)
    h.extend(ids(0, 1), ids(5, 6)[:, None], ids(1, 1))
    h.extend(ids(1, 0), ids(7, 8)[:, None], ids(1, 1))
    emit(h, 0, 1, 2)
    emit(h, 1, 1, 2)
    assert [proposed(h, slot, 2) for slot in (0, 1)] == [[5, 8], [6, 7]]


class BruteForce:
    """Looks everything up in a list of all tokens, in the order they came."""

    def __init__(self, orders):
        self.orders = sorted(orders, reverse=True)
        self.log = []  # (group, text, position)
        self.live, self.prompts = {}, set()

    def begin(self, slot, prompt, group):
        if group not in self.prompts:
            self.prompts.add(group)
            self._append(group, [], prompt)
        self.live[slot] = group, list(prompt[-self.orders[0] :])

    def extend(self, slot, tokens):
        self._append(*self.live[slot], tokens)

    def _append(self, group, text, tokens):
        for token in tokens:
            self.log.append((group, text, len(text)))
            text.append(token)

    def _find(self, slot):
        group, text = self.live[slot]
        for n in self.orders:
            for other, found, at in reversed(self.log):
                if other == group and min(at, len(text)) >= n and found[at - n : at] == text[-n:]:
                    return found, at
        return None

    def propose(self, slot, limit):
        draft, here = [], self._find(slot)
        while here is not None and len(draft) < limit:
            text, at = here
            if at < len(text):
                draft.append(text[at])
                here = text, at + 1
            else:
                owner = next((s for s, (_, live) in self.live.items() if live is text), None)
                here = None if owner is None else self._find(owner)
        return draft


@settings(max_examples=150, deadline=None)
@given(
    orders=st.sets(st.integers(1, 5), min_size=1, max_size=3),
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 9)),
        max_size=60,
    ),
)
def test_proposals_are_those_of_brute_force(orders, steps):
    h, reference = Exact(max_tokens=10_000, orders=tuple(orders)), BruteForce(orders)
    prompts = [ids(0, 1, 0, 2, 1), ids(2)]
    for slot, tokens, choice in steps:
        if slot not in reference.live:
            prompt = prompts[choice % 2]
            h.begin(slot, prompt)
            reference.begin(slot, prompt.tolist(), choice % 2)
        elif choice == 9:
            h.finish(slot)
            del reference.live[slot]
            continue
        emit(h, slot, *tokens)
        reference.extend(slot, tokens)
        slots = np.array(list(reference.live))
        limits = np.full(len(slots), choice)
        matches = h.match(slots, limits)
        expected = [reference.propose(s, choice) for s in slots.tolist()]
        assert matches.lengths.tolist() == [len(draft) for draft in expected]
        rows = h.propose(slots, matches.lengths)
        assert [row[: len(draft)] for row, draft in zip(rows.tolist(), expected)] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.sampled_from([History, Colliding]))
def test_a_match_is_true_whatever_the_hash(tokens, kind):
    h = kind(max_tokens=10_000)
    h.begin(0, ids(0, 1))
    text = [0, 1]
    for token in tokens:
        emit(h, 0, token)
        text.append(token)
        draft = proposed(h, 0)
        if draft:
            n = h.orders[h._state[0, BUCKET] % len(h.orders)]
            ends = [at for at in range(n, len(text)) if text[at - n : at] == text[-n:]]
            assert any((text + draft)[at : at + len(draft)] == draft for at in ends)


def test_groups_are_kept_apart_even_if_their_hashes_are_the_same():
    h = Colliding(orders=(2,))
    h.begin(0, ids(1, 2, 3), group="a")
    h.begin(1, ids(2, 3), group="b")
    emit(h, 0, 4, 1, 2)
    assert proposed(h, 1) == []


class Reference:
    """History over lists and dictionaries, one sequence after another; a table as large as it takes."""

    def __init__(self, max_tokens, answers_per_prompt, orders, longest):
        self.max_tokens, self.answers_per_prompt = max_tokens, answers_per_prompt
        self.orders, self.longest = sorted(orders, reverse=True), longest
        self.table, self.live, self.groups = {}, {}, {}
        self.evicted = 0
        self.tried, self.right = np.zeros((2, 3, len(orders)), np.int64)

    def begin(self, slot, prompt, output, group):
        self.touch(group, prompt)
        text = {"tokens": prompt[-self.orders[0] :], "kind": SIBLINGS, "known": True, "group": group}
        self.live[slot] = {"text": text, "prompt": prompt, "draft": []}
        self.append(text, output)
        self.make_room()

    def touch(self, group, prompt):
        if group not in self.groups:
            text = {"tokens": [], "kind": OWN, "known": True, "group": group}
            self.append(text, prompt)
            self.groups[group] = [text]
        self.groups[group] = self.groups.pop(group)

    def append(self, text, tokens):
        for token in tokens:
            for n in self.orders:
                if len(text["tokens"]) >= n:
                    self.table[(text["group"], *text["tokens"][-n:])] = text, len(text["tokens"])
            text["tokens"] = [*text["tokens"], token]

    def extend(self, slot, tokens):
        live = self.live[slot]
        for draft, token in zip(live["draft"], tokens):
            self.tried[live["bucket"]] += 1
            if draft != token:
                break
            self.right[live["bucket"]] += 1
        live["draft"] = []
        self.append(live["text"], tokens)

    def finish(self, slot, keep):
        live = self.live.pop(slot)
        text = live["text"]
        text["known"] = keep
        if keep:
            self.touch(text["group"], live["prompt"])
            group = self.groups[text["group"]]
            group.append(text)
            if len(group) > 1 + self.answers_per_prompt:
                group.pop(1)["known"] = False
            self.make_room()

    def tokens(self):
        return sum(len(text["tokens"]) for group in self.groups.values() for text in group)

    def make_room(self):
        while self.tokens() > self.max_tokens:
            self.evicted += 1
            for text in self.groups.pop(next(iter(self.groups))):
                text["known"] = False

    def find(self, text):
        for i, n in enumerate(self.orders):
            found, at = self.table.get((text["group"], *text["tokens"][-n:]), (None, 0))
            if len(text["tokens"]) >= n and found is not None and found["known"]:
                return found, at, (OWN if found is text else found["kind"], i)
        return None

    def match(self, slot, limit):
        live, draft = self.live[slot], []
        source = self.find(live["text"])
        live["bucket"] = source and source[2]
        writing = [other["text"] for other in self.live.values()]
        while source is not None and len(draft) < min(limit, self.longest):
            found, at, _ = source
            draft += found["tokens"][at:]
            source = self.find(found) if any(found is text for text in writing) else None
        live["draft"] = draft[: min(limit, self.longest)]
        return live["draft"]

    def after_update(self):
        for group in self.groups.values():
            for text in group[1:]:
                text["kind"] = EPOCHS


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_reference_on_random_runs(seed, monkeypatch):
    """With eviction, preemption, updates, siblings that grow at once, ragged emission, and texts that move."""
    monkeypatch.setattr(texts, "_FIRST_TOKENS", 64)
    monkeypatch.setattr(texts, "_FIRST_TEXTS", 2)
    monkeypatch.setattr(history, "_FIRST_SLOTS", 1)
    monkeypatch.setattr(history, "_FIRST_ROOM", 1)
    rng = np.random.default_rng(seed)
    orders = [(1, 2, 4), (2, 4, 8), (3,)][seed % 3]
    limits = {"max_tokens": int(rng.choice([60, 300, 5000])), "answers_per_prompt": int(rng.integers(1, 5))}
    options = {**limits, "orders": orders, "longest": int(rng.choice([1, 5, 64]))}
    h, reference = Exact(**options), Reference(**options)
    prompts = [rng.integers(0, 3, n) for n in (1, 2, 7, 20, 30)]
    preempted = []

    def begin(slot, group, output):
        h.begin(slot, prompts[group], np.array(output, np.int64), group)
        reference.begin(slot, prompts[group].tolist(), output, group)

    for _ in range(150):
        for slot in range(8):
            if slot not in reference.live and rng.random() < 0.5:
                begin(slot, *(preempted.pop() if preempted else (int(rng.integers(len(prompts))), [])))
        slots = rng.permutation(list(reference.live)).astype(np.int64)
        allowed = rng.integers(0, 12, len(slots))
        matches = h.match(slots, allowed)
        drafts = [reference.match(slot, limit) for slot, limit in zip(slots.tolist(), allowed.tolist())]
        assert matches.lengths.tolist() == [len(draft) for draft in drafts]
        assert ((matches.confidence > 0) == (matches.lengths > 0)).all()
        for slot in slots[
            rng.random(len(slots)) < 0.1
        ].tolist():  # between match and propose, as the engine may
            live = reference.live[slot]
            preempted.append(
                (live["text"]["group"], live["text"]["tokens"][len(live["prompt"][-orders[0] :]) :])
            )
            h.finish(slot, keep=False)
            reference.finish(slot, keep=False)
        kept = np.array([slot in reference.live for slot in slots.tolist()], bool)
        slots, counts = slots[kept], matches.lengths[kept]
        drafts = [draft for draft, stays in zip(drafts, kept) if stays]
        rows = h.propose(slots, counts).tolist()
        width = int(counts.max(initial=0))
        assert rows == [draft + [0] * (width - len(draft)) for draft in drafts]

        tokens = rng.integers(0, 3, (len(slots), int(rng.choice([1, 1, 6]))))
        for row, draft in zip(tokens, drafts):
            right = int(rng.integers(0, tokens.shape[1] + 1))
            row[: len(draft[:right])] = draft[:right]
        emitted = rng.integers(0, tokens.shape[1] + 1, len(slots))
        h.extend(slots, tokens, emitted)
        for slot, row, count in zip(slots.tolist(), tokens.tolist(), emitted.tolist()):
            reference.extend(slot, row[:count])
        for slot in slots[rng.random(len(slots)) < 0.1].tolist():
            h.finish(slot)
            reference.finish(slot, keep=True)
        if rng.random() < 0.05:
            h.after_update()
            reference.after_update()
        stats = h.stats()
        assert stats.tried.tolist() == reference.tried.tolist()
        assert stats.right.tolist() == reference.right.tolist()
        assert (stats.prompts, stats.tokens) == (len(reference.groups), reference.tokens())
        assert stats.evicted == reference.evicted
    assert stats.right.sum() > 0


def test_own_text_and_prompt():
    h = History()
    h.begin(0, ids(1, 2, 3, 4, 5, 6))
    emit(h, 0, 9, 2, 3)
    assert proposed(h, 0) == [4, 5, 6]
    emit(h, 0, 7, 8, 9, 2)
    assert proposed(h, 0, 2) == [3, 7]
    emit(h, 0, 3)
    assert h.stats().tried[OWN].sum() == 2
    assert h.stats().right[OWN].sum() == 1


def test_the_longest_match_wins_then_the_latest():
    h = History()
    h.begin(0, ids(50))
    emit(h, 0, 1, 2, 3, 4, 10, 9, 3, 4, 11, 8, 3, 4, 12, 7, 1, 2, 3, 4)
    assert proposed(h, 0, 1) == [10]
    emit(h, 0, 60, 3, 4)
    assert proposed(h, 0, 1) == [60]


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_loop_is_proposed_for_as_long_as_it_is_wanted(period):
    h = History()
    h.begin(0, ids(50, 51))
    loop = list(range(period))
    emit(h, 0, *(loop * 6))
    assert proposed(h, 0, 30) == (loop * 30)[:30]
    assert len(proposed(h, 0, 10_000)) == h.longest


def test_live_siblings_see_each_other_and_a_proposal_goes_on_where_theirs_does():
    h = History()
    prompt = ids(1, 2, 3)
    answer(h, 2, prompt, 4, 5, 6, 7, 8, END)
    h.begin(0, prompt)
    h.begin(1, prompt)
    emit(h, 0, 20, 21, 4, 5)
    emit(h, 1, 20, 21)
    matches = h.match(ids(1, 0), ids(8, 8))
    assert matches.lengths.tolist() == [6, 4]
    tokens = h.propose(ids(1, 0), matches.lengths)
    assert (tokens.dtype, tokens.tolist()) == (
        np.int64,
        [[4, 5, 6, 7, 8, END], [6, 7, 8, END, 0, 0]],
    )
    emit(h, 1, 4)
    assert h.stats().tried[SIBLINGS].sum() == 1


def test_the_next_epoch_finds_the_answers_of_the_last_and_ends_where_they_end():
    h = History()
    for i in range(5):
        answer(h, 0, ids(i, 2, 3), 10 + i, 11, 12, 13, END)
        h.after_update()
    h.begin(7, ids(3, 2, 3))
    assert proposed(h, 7) == [13, 11, 12, 13, END]
    emit(h, 7, 13, 11, 12)
    assert (h.stats().tried[EPOCHS].sum(), h.stats().right[EPOCHS].sum()) == (3, 3)
    assert proposed(h, 7) == [13, END]


def test_an_aborted_answer_leaves_nothing_and_its_slot_starts_afresh():
    h = History()
    answer(h, 0, ids(1, 2, 3), 4, 5, 6, keep=False)
    assert (h.stats().answers, h.stats().tokens) == (0, 3)
    h.begin(0, ids(1, 2, 3))
    assert proposed(h, 0) == []
    emit(h, 0, 7, 7, 7)
    h.finish(0)
    h.begin(0, ids(8, 9))
    assert proposed(h, 0) == []
    with pytest.raises(AssertionError):
        h.begin(0, ids(8, 9))


def test_a_sequence_goes_on_after_an_interruption():
    h = History()
    h.begin(0, ids(1, 2, 3))
    emit(h, 0, 4, 5, 6, 4, 5)
    before = proposed(h, 0)
    h.finish(0, keep=False)
    h.begin(3, ids(1, 2, 3), output=ids(4, 5, 6, 4, 5))
    assert proposed(h, 3) == before == [6, 4, 5, 6, 4, 5, 6, 4]


def test_what_an_interrupted_answer_brings_is_later_than_what_was_emitted_before():
    h, prompt = History(orders=(2,)), ids(1, 2, 3)
    h.begin(0, prompt)
    for token in (5, 6):
        emit(h, 0, token)
    h.begin(1, prompt, ids(5, 7))
    h.begin(2, prompt)
    emit(h, 2, 5)
    assert proposed(h, 2)[0] == 7


def test_groups_decide_who_matches_whom():
    for group, expected in ((lambda i: i, []), (lambda i: "all", [7, 8, 9])):
        h = History()
        h.begin(0, ids(1, 2, 3), group=group(0))
        h.begin(1, ids(4, 2, 3), group=group(1))
        emit(h, 0, 7, 8, 9)
        assert proposed(h, 1) == expected


def test_memory_stays_bounded_and_the_least_recently_used_prompt_goes_first():
    h = History(max_tokens=1000)
    rng = np.random.default_rng(0)
    bytes_before = h.stats().nbytes
    for i in range(500):
        answer(h, 0, ids(7, 7, i), *rng.integers(100, 1000, 20))
        answer(h, 1, ids(1, 2, 3), 4, 5, 6, END)
        stats = h.stats()
        assert stats.tokens <= 1000
        assert stats.nbytes - bytes_before <= 4 * 1000
    kept = [text for group in h._groups.values() for text in group]
    assert sorted(kept) == np.flatnonzero(h._texts.room).tolist()
    assert stats.tokens == h._texts.length[kept].sum()
    assert stats.evicted == 501 - stats.prompts > 400
    assert max(len(group) - 1 for group in h._groups.values()) == h.answers_per_prompt
    h.begin(0, ids(1, 2, 3))
    assert proposed(h, 0) == [4, 5, 6, END]
    h.begin(1, ids(7, 7, 3))
    assert proposed(h, 1) == []


def test_a_prompt_evicted_while_it_is_answered_is_known_again_afterwards():
    h = History(max_tokens=40)
    h.begin(0, ids(1, 2, 3, 4, 5), group="late")
    emit(h, 0, 2, 3, 8, 9)
    for i in range(10):
        answer(h, 1, ids(50 + i), *range(60, 75))
    assert "late" not in h._groups
    assert proposed(h, 0) == []
    h.finish(0)
    h.begin(0, ids(1, 2, 3, 4, 5), group="late")
    emit(h, 0, 2, 3)
    assert proposed(h, 0) == [8, 9]


def test_what_is_larger_than_all_memory_is_not_kept():
    h = History(max_tokens=10)
    answer(h, 0, ids(*range(20)), 1, 2, 3)
    assert (h.stats().tokens, h.stats().prompts, h._texts.room.any()) == (0, 0, False)


def test_only_the_end_of_a_very_long_prompt_is_indexed(monkeypatch):
    monkeypatch.setattr(history, "_PROMPT_WINDOW", 6)
    h = History()
    h.begin(0, ids(*range(20)))
    emit(h, 0, 3, 4)
    assert proposed(h, 0) == []
    emit(h, 0, 15, 16)
    assert proposed(h, 0) == [17, 18, 19]


@pytest.mark.parametrize("width", [1, 4])
def test_confidence_is_the_acceptance_per_token_drafted_or_not(width):
    """Quotes of the prompt that go on with probability 0.8 per token, decoded `width` tokens at a time."""
    h, rng = Exact(orders=(2,)), np.random.default_rng(0)
    for i in range(8):
        h.begin(i, np.arange(4000) + 4000 * i)
        for start in range(0, 3990, 10):
            emit(h, i, *(4000 * i + start + np.arange(2)))
            draft = proposed(h, i, width)
            assert draft == (4000 * i + start + 2 + np.arange(width)).tolist()
            right = next((j for j, chance in enumerate(rng.random(width)) if chance > 0.8), width)
            emit(h, i, *draft[:right], 50_000)
    stats = h.stats()
    assert stats.right.sum() / stats.tried.sum() == pytest.approx(0.8, abs=0.03)
    emit(h, 0, 0, 1)
    assert h.match(ids(0), ids(width)).confidence[0] == pytest.approx(0.8, abs=0.05)


def test_confidence_starts_open_learns_by_source_and_fades_with_an_update():
    h = History()
    h.begin(0, ids(50))
    emit(h, 0, 1, 2, 3, 1, 2)
    assert h.match(ids(0), ids(4)).confidence.tolist() == [0.5]
    for _ in range(30):
        emit(h, 0, 3, 1, 2)
        sure = h.match(ids(0), ids(4)).confidence[0]
    assert sure > 0.95
    for _ in range(4):
        h.after_update()
    assert 0.5 < h.match(ids(0), ids(4)).confidence[0] < sure
    h.begin(1, ids(60))
    assert h.match(ids(1), ids(4)).confidence.tolist() == [0.0]


def test_more_than_was_found_is_padding():
    h = History()
    h.begin(0, ids(50))
    emit(h, 0, 1, 2, 3, 1, 2)
    found = h.match(ids(0), ids(2)).lengths
    assert found.tolist() == [2]
    assert h.propose(ids(0), found + 3).tolist() == [[3, 1, 0, 0, 0]]


def test_nothing_is_proposed_where_nothing_is_allowed():
    h = History()
    h.begin(0, ids(50))
    emit(h, 0, 1, 2, 1, 2)
    matches = h.match(ids(0), ids(0))
    assert (matches.lengths.tolist(), matches.confidence.tolist()) == ([0], [0.0])
    assert h.propose(ids(0), matches.lengths).shape == (1, 0)
    emit(h, 0, 3)
    assert h.stats().tried.sum() == 0


def test_what_is_read_late_is_copied():
    """Kept arrays of many passes would take the holes that the allocator has for the next pass."""
    h, tokens = History(max_tokens=4000), np.zeros((1, 1), np.int64)
    h.begin(0, ids(1, 2, 3))
    for token in (7, 8, 9, 7, 8):
        tokens[:] = token
        h.extend(ids(0), tokens, ids(1))
    assert h.match(ids(0), ids(1)).lengths.tolist() == [1]
    assert h.propose(ids(0), ids(1)).tolist() == [[9]]


def test_what_is_read_late_is_read_all_the_same():
    """Plain passes are put off until somebody looks: several sequences, some of which end meanwhile."""
    rng = np.random.default_rng(0)
    late, eager, prompt = History(max_tokens=4000), History(max_tokens=4000), ids(1, 2, 3)
    for h in (late, eager):
        for slot in range(3):
            h.begin(slot, prompt)
    for step in range(200):
        live = np.arange(3 if step < 150 else 2)
        tokens = rng.integers(0, 4, (len(live), 1))
        for h in (late, eager):
            h.extend(live, tokens, np.ones(len(live), np.int64))
        eager.match(live, np.full(len(live), 8))
        if step == 149:
            late.finish(2)
            eager.finish(2)
        if step % 90 == 89 or step == 199:  # more than are put off
            limits = np.full(len(live), 8)
            ours, theirs = late.match(live[:2], limits[:2]), eager.match(live[:2], limits[:2])
            np.testing.assert_array_equal(ours.lengths, theirs.lengths)
            np.testing.assert_array_equal(
                late.propose(live[:2], ours.lengths), eager.propose(live[:2], theirs.lengths)
            )
    assert late.stats().tokens == eager.stats().tokens
