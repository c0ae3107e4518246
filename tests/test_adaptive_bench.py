"""How `bench adaptive` pairs rollouts; nothing is decoded here."""

from itertools import permutations
from types import SimpleNamespace

import pytest
from rich.console import Console

from rollout_spec.benchmarks.adaptive import AdaptiveBenchmark
from rollout_spec.contracts import SpecCounts

KINDS = {"copy": 1.0, "trained": 2.0, "both": 4.0}


@pytest.fixture
def bench(monkeypatch):
    made = AdaptiveBenchmark.__new__(AdaptiveBenchmark)
    made.console, made.seen, made.tokens = Console(quiet=True), [], {}

    def rollout(policy, prompts, ids, longest):
        made.seen.append((policy, (*prompts, *ids)))
        answer = SimpleNamespace(token_ids=made.tokens.get(policy, [1, 2]), spec=SpecCounts(verify_steps=1))
        return KINDS[policy] * int(prompts[0]), [answer]

    monkeypatch.setattr(made, "_rollout", rollout)
    return made


def test_kinds_take_turns_in_every_order_on_the_same_prompts(bench):
    rollouts = [[str(draw)] for draw in range(1, 8)]
    seconds, spec = bench._interleaved("x", {kind: kind for kind in KINDS}, rollouts, uncounted=1)
    draws = [bench.seen[i : i + 3] for i in range(0, len(bench.seen), 3)]
    assert {tuple(kind for kind, *_ in draw) for draw in draws[:6]} == set(permutations(KINDS))
    assert all(len({asked for _, asked in draw}) == 1 for draw in draws)
    assert seconds == {kind: [factor * draw for draw in range(2, 8)] for kind, factor in KINDS.items()}
    assert all(found.verify_steps == 6 for found in spec.values())


def test_a_token_that_differs_stops_it(bench):
    bench.tokens["both"] = [1, 3]
    with pytest.raises(AssertionError, match="changed a token"):
        bench._interleaved("x", {kind: kind for kind in KINDS}, [["1"]])
