"""History's compiled loops."""

import numpy as np

from rollout_spec.drafters.history import History
from rollout_spec.drafters.lookup import (
    LENGTH,
    ROOM,
    SALT,
    SLOT,
    SOURCE,
    START,
    goes_on,
    hashes,
    judge,
    look_up,
    write,
)
from rollout_spec.drafters.texts import Texts


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def test_columns_are_those_of_texts():
    texts, columns = Texts(2), (START, LENGTH, ROOM, SALT, SOURCE, SLOT)
    texts.numbers[:] = np.arange(6)
    named = (texts.start, texts.length, texts.room, texts.salt, texts.source, texts.slot)
    assert [set(column) for column in named] == [{number} for number in columns]


def test_no_loop_is_left_to_be_compiled_in_a_pass():
    """With arrays like an engine's: int64, in one piece but for tokens, which may be a part of more."""
    h, loops = History(max_tokens=1000), (goes_on, hashes, judge, look_up, write)
    known = [len(loop.signatures) for loop in loops]
    h.begin(0, ids(1, 2, 3))
    h.begin(1, ids(1, 2, 3), output=ids(4, 5))
    for emitted in (ids(1, 1), ids(2, 1), ids(1, 1), ids(1, 1)):
        h.match(ids(0, 1), ids(5, 5))
        h.extend(ids(0, 1), np.arange(6).reshape(2, 3)[:, :2], emitted)
    h.finish(0)
    assert min(known) > 0 and [len(loop.signatures) for loop in loops] == known


def test_confidence_forgets():
    """Right for long, then wrong for a while; all of it stays counted."""
    outcomes, recent = np.zeros((2, 3)), np.ones((2, 3))
    for token in 100 * [5] + 20 * [6]:
        state, drafts = ids(1, 1, 1, 2)[None], np.array([[5]], np.int32)
        judge(ids(0), ids(token)[None], ids(1), state, drafts, outcomes, recent, 8.0)
    assert outcomes[:, 2].tolist() == [100, 120]
    assert recent[0, 2] / recent[1, 2] < 0.2
