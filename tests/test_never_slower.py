"""`rollout-spec bench never-slower`: how it counts."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from rollout_spec.benchmarks import toggling
from rollout_spec.benchmarks.never_slower import _enough, decision_microseconds
from rollout_spec.benchmarks.toggling import Switching, overhead, toggling_overhead
from rollout_spec.commands.bench import never_slower
from rollout_spec.example_policy import example_folder
from rollout_spec.policy.automatic import AutomaticPolicy

ON, OFF = 0.03, 0.02  # seconds of a step


def steps(modes, after_a_switch=0.0, hiccups=0):
    made = Switching(4, 1, lambda: True)
    for step, (before, on) in enumerate(zip([modes[0], *modes], modes)):
        hiccup = step % 20 == 19 and step < 20 * hiccups
        made.steps.append((on, (ON if on else OFF) + after_a_switch * (on != before) + hiccup))
    return made


@pytest.mark.parametrize("price", [0.0, 0.004])
def test_what_a_switch_costs_shows_though_only_half_of_the_steps_follow_one(price):
    always, never = steps(100 * [True]), steps(100 * [False])
    for seed in range(5):
        modes = (np.random.default_rng(seed).random(400) < 0.5).tolist()
        switches = np.count_nonzero(np.diff(modes))
        paid = price * switches / (sum(modes) * ON + (400 - sum(modes)) * OFF)
        assert overhead(steps(modes, price), always, never) == pytest.approx(paid, rel=0.15, abs=1e-9)


def test_a_few_steps_in_which_the_machine_did_something_else_do_not_count():
    always, never = steps(100 * [True], hiccups=3), steps(100 * [False])
    mixed = steps([True, True, False] * 70, hiccups=6)
    assert overhead(mixed, always, never) == pytest.approx(0.0, abs=1e-9)


def test_the_first_steps_whose_weights_may_be_in_no_cache_do_not_count():
    always, never, mixed = steps(100 * [True]), steps(100 * [False]), steps([True, False] * 50)
    for made in (always, never, mixed):
        made.steps[:5] = [(on, 10 * seconds) for on, seconds in made.steps[:5]]
    assert overhead(mixed, always, never) == pytest.approx(0.0, abs=1e-9)


def test_toggling_is_compared_with_a_plain_decoder_beside_whom_the_drafters_weights_are_read(monkeypatch):
    """It is never on; the steps that stand for the verify passes are not kept."""
    made, reads = [], []

    class Watched(toggling._Beside):
        def __init__(self, *what):
            super().__init__(*what)
            self.all_steps = 0
            made.append(self)

        def observe(self, state, plan, outcome):
            self.all_steps += 1
            super().observe(state, plan, outcome)

        def _read(self):
            reads.append(len(self._drafter))
            super()._read()

    monkeypatch.setattr(toggling, "_Beside", Watched)
    found = toggling_overhead(example_folder() / "policy", batch=2, pairs=2, seed=0)
    assert found["identical"] and found["tokens"] == 2 * toggling._TOKENS
    assert {"overhead", "overhead_beyond_cache", "off_beside"} <= found.keys()
    assert len(made) == 2
    assert all(not on for policy in made for on, _ in policy.steps)
    kept, stood_in = sum(len(policy.steps) for policy in made), len(reads)
    assert min(kept, stood_in) > 50
    assert sum(policy.all_steps for policy in made) == pytest.approx(kept + stood_in, abs=2)
    assert min(reads) > 4, "all linears of the drafter"


def test_answers_that_differ_are_said(monkeypatch):
    generate, calls = toggling.RolloutEngine.generate, []

    def altered(self, *what, **options):
        answers = generate(self, *what, **options)
        calls.append(1)
        return answers[::-1] if len(calls) == 3 else answers

    monkeypatch.setattr(toggling.RolloutEngine, "generate", altered)
    assert not toggling_overhead(example_folder() / "policy", batch=2, pairs=1, seed=0)["identical"]


@pytest.mark.parametrize("median", [0.9, 1.0])
def test_comparisons_go_on_until_the_bound_is_near_the_median_wherever_that_is(median):
    sure, unsure = [median - 0.001, median, median + 0.001] * 5, np.linspace(median - 0.3, median + 0.3, 27)
    assert not _enough(sure[:8], pairs=9)
    assert _enough(sure, pairs=9)
    assert not _enough(unsure[::2], pairs=9)
    assert _enough(unsure, pairs=9), "three times as many"


def test_where_much_is_gained_a_bound_may_be_further_off():
    assert _enough([1.9, 2.0, 2.1] * 5, pairs=9)


@pytest.mark.parametrize("changing", [False, True])
def test_looks_are_timed_where_every_pass_has_new_sequences(changing, monkeypatch):
    looks, value = [], AutomaticPolicy._value_of_tokens

    def watched(self, *what):
        looks.append(1)
        return value(self, *what)

    monkeypatch.setattr(AutomaticPolicy, "_value_of_tokens", watched)
    found = decision_microseconds(changing)
    assert set(found) == {f"B={2**b}" for b in range(8)}
    assert (len(looks) == 400 * len(found)) is changing


def test_batch_sizes_without_a_sweep_are_refused():
    found = CliRunner().invoke(never_slower, ["--only", "decisions", "--batch", "8"])
    assert found.exit_code == 2
    assert "--batch 8 is of the sweep" in found.output and "add --only sweep" in found.output


def test_one_part_is_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("rollout_spec.commands.bench.NeverSlower", None)
    CliRunner().invoke(never_slower, ["--only", "decisions", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found.keys() == {"model", "decision_microseconds", "look_microseconds"}
