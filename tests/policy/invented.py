"""Policies on invented costs, and what there is to decide on."""

from itertools import repeat

import numpy as np

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import StepOutcome, StepState

COSTS = CostModel(
    {
        "target": PassCost(1e-3, 2e-4, 18e-3, 7e-4, 5e-8),
        "nf4": PassCost(1e-3, 2e-4, 5e-3, 6e-4, 5e-8),
    }
)


def policy(costs=COSTS, **options):
    """A policy that has seen plain passes of every size to cost what the model says."""
    made = AutomaticPolicy(costs, **{"probe_share": 0.0, "explore_share": 0.0} | options)
    for batch in 3 * [2**b for b in range(9)]:
        made.costs.observe_target(batch, batch, 100 * batch, costs.target(batch, batch, 100 * batch))
    return made


def state(batch=1, context=100, outputs=50, allowed=400, drafters=("nf4",), matches=None, **options):
    def fill(x):
        return np.broadcast_to(np.asarray(x, np.int64), (batch,)).copy()

    return StepState(
        np.arange(batch), fill(context), fill(outputs), fill(allowed), drafters, matches, **options
    )


def seen(acceptance, tokens=4000, longest=16):
    """A policy that has watched nf4 being accepted this often."""
    made = policy()
    rng = np.random.default_rng(0)
    for _ in range(tokens // longest):
        hits = rng.random(longest) < acceptance
        accepted = longest if hits.all() else int(hits.argmin())
        made.acceptance["nf4"].observe(np.array([40]), np.array([longest]), np.array([accepted]))
    return made


def run(made, where, alpha, passes, costs=COSTS, deciding=None):
    """Carry plans out with true acceptance `alpha` of every drafter; returns the plans."""
    rng, plans = np.random.default_rng(1), []
    for _, decided in zip(range(passes), deciding or repeat(0.0)):
        plan = made.plan(where)
        hits = rng.random((len(where.slots), 65)) < alpha
        accepted = np.minimum(hits.argmin(1), plan.draft_lengths)
        rows, context = len(where.slots) + int(plan.draft_lengths.sum()), int(where.lengths.sum())
        drafting = plan.draft_lengths.max() * costs.draft("nf4", len(where.slots), context)
        drafting = float(drafting) if plan.drafter else 0.0
        target = costs.target(len(where.slots), rows, context)
        done = np.zeros(len(where.slots), bool)
        made.observe(where, plan, StepOutcome(accepted, accepted + 1, done, drafting, target, decided))
        plans.append(plan)
    return plans
