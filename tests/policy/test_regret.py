"""The automatic policy against an oracle that knows acceptances, lengths and costs, on synthetic rollouts."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.devices import DEVICES, QWEN2_5_7B, from_datasheet
from rollout_spec.policy.oracle import Oracle
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import SYNTHETIC, from_lengths

COSTS = from_datasheet(DEVICES["H200"], QWEN2_5_7B)
SEEDS = 2
SHORT_AND_LONG = (200, 100_000)  # prompt tokens
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


def test_where_contexts_differ_every_rule_by_batch_size_loses():
    """As many sequences, and the same drafter: what pays while contexts are short loses where they are long, whatever K."""

    def took(prompt, policy):
        workload = SYNTHETIC["kv_heavy"](8)
        workload = replace(workload, prompts=np.full(len(workload.outputs), prompt))
        return makespan(simulate(workload, policy, COSTS)) / makespan(simulate(workload, Off(), COSTS))

    short, long = (took(prompt, AutomaticPolicy(COSTS)) for prompt in SHORT_AND_LONG)
    assert short < 0.8 and long < 1.005
    for K in (1, 2, 3, 5, 8):
        by_batch = [took(prompt, Fixed(K, 32)) for prompt in SHORT_AND_LONG]
        assert by_batch[0] < 1 and (by_batch[1] > 1.03 or K == 1)
        assert sum(by_batch) > 1.02 * (short + long)
    assert 1.1 * (short + long) < 2.0  # so does never to draft


FOUND_WITHIN, OVER_KNOWING = 2000, 1.05  # passes; of the time of a policy that knew


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [1, 4])
def test_a_drafter_that_the_prior_speaks_against_is_found(batch, seed):
    """Both are accepted alike; the better one is believed to be four times as slow as it is."""
    target, slow, fast = (PassCost(1e-3, 2e-4, read, 3e-4, 5e-8) for read in (18e-3, 6e-3, 2e-3))
    true = CostModel({"target": target, "nf4": slow, "int4": fast})
    believed = CostModel({"target": target, "nf4": slow, "int4": replace(fast, weights=8e-3)})
    workload = from_lengths("w", np.full(batch, 20_000), alpha={"nf4": 0.9, "int4": 0.9}, limit=20_000)
    trace, knowing = (
        simulate(workload, AutomaticPolicy(costs, seed=seed), true, seed=seed) for costs in (believed, true)
    )
    modes = [step.mode for step in trace.steps]
    assert modes[:20].count("nf4") > 15
    assert modes[FOUND_WITHIN:].count("int4") > 0.95 * len(modes[FOUND_WITHIN:])
    assert makespan(trace) < OVER_KNOWING * makespan(knowing)
