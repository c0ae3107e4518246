"""The automatic policy against an oracle that knows acceptances, lengths and costs, on synthetic rollouts."""

import functools

import numpy as np
import pytest

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off
from rollout_spec.policy.devices import DEVICES, QWEN2_5_7B, from_datasheet
from rollout_spec.policy.oracle import Oracle
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import SYNTHETIC

COSTS = from_datasheet(DEVICES["H200"], QWEN2_5_7B)
SEEDS = 2
WITHIN = (
    "long_tail",
    "jumping_batch",
    "collapsing_acceptance",
    "kv_heavy",
    "one_straggler",
    "uniform",
    "many_medium",
)


@functools.cache
def seconds(name, kind):
    """Mean simulated makespan over the seeds."""
    workload = SYNTHETIC[name]()
    makers = {
        "automatic": lambda: AutomaticPolicy(COSTS),
        "oracle": lambda: Oracle(workload, COSTS),
        "off": Off,
        "batch only": lambda: Fixed(5, 32),
    }
    return np.mean([makespan(simulate(workload, makers[kind](), COSTS, seed=s)) for s in range(SEEDS)])


@pytest.mark.parametrize("name", WITHIN)
def test_regret_to_the_oracle_is_at_most_five_percent(name):
    assert seconds(name, "automatic") <= 1.05 * seconds(name, "oracle")


def test_where_text_repeats_most_of_the_gain_is_had():
    """History alone more than doubles the speed here; the regret is a little above five percent."""
    assert seconds("repeating", "automatic") <= 1.08 * seconds("repeating", "oracle")
    assert seconds("repeating", "automatic") < 0.5 * seconds("repeating", "off")


@pytest.mark.parametrize("name", SYNTHETIC)
def test_never_much_slower_than_plain_decoding(name):
    """Two percent at most goes into finding out, even where acceptance collapses on the way."""
    assert seconds(name, "automatic") <= 1.02 * seconds(name, "off")


def test_on_long_contexts_a_rule_by_batch_size_loses():
    """Few sequences, so that a batch threshold speculates, but so much to read that drafting cannot pay."""
    assert seconds("kv_heavy", "batch only") > 1.5 * seconds("kv_heavy", "off")
    assert seconds("kv_heavy", "automatic") < 1.02 * seconds("kv_heavy", "off")
