"""How well a policy could do: one that knows acceptance, remaining lengths and costs, but not the luck.

Progress is worth what it takes off the makespan. With remaining lengths sorted, R_1 <= ... <= R_B, and t(b) the
time per token while b sequences are live, draining takes

    M(R) = sum_k (R_k - R_{k-1}) t(B - k + 1) = sum_k w_k R_k,    w_k = t(B - k + 1) - t(B - k)

and a pass of duration T that emits tau tokens is worth (M(R) - M(R - tau)) / T. t(b) is that of the best uniform
K for b sequences, off included, not that of plain decoding: a straggler can be hurried later, when it is alone,
more cheaply than now.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.records import Plan, Reason, SpeculationPolicy, StepOutcome, StepState
from rollout_spec.policy.simulator import plan_seconds
from rollout_spec.policy.workloads import Workload


class Oracle(SpeculationPolicy):
    """Plans one simulated run of `workload` with costs `costs`: off, or the best of every drafter's drafts.

    Drafts are as long for everyone (K = 1..`longest`) or each as long as its tokens are worth at least some value.
    """

    def __init__(self, workload: Workload, costs: CostModel, longest: int = 16, thresholds: int = 16) -> None:
        self.workload, self.costs = workload, costs
        self.longest, self.thresholds = longest, thresholds
        self._request: dict[int, int] = {}  # of each slot; requests start in order
        self._started = 0
        self._clock = 0.0

    def plan(self, state: StepState) -> Plan:
        requests = self._requests(state)
        batch = len(requests)
        left = self.workload.outputs[requests] - state.outputs
        lengths, by_rank = self._drain(state, requests, left)
        shared = lengths != left
        ties = (lengths.max() - lengths) // self.longest
        weights = _shared(by_rank[np.argsort(np.argsort(lengths, kind="stable"))], ties)

        def rate(tau: np.ndarray, seconds: np.ndarray | float) -> np.ndarray:
            """Makespan taken off per second, [C], by passes that emit `tau` [C, B] in `seconds` [C]."""
            if shared.any():
                tau[:, shared] = tau[:, shared].mean(axis=1, keepdims=True)
            return (by_rank @ np.sort(lengths) - np.sort(lengths - tau, axis=1) @ by_rank) / seconds

        plain_seconds = self.costs.target(batch, batch, int(state.lengths.sum()))
        plain_rate = float(rate(np.ones((1, batch)), plain_seconds)[0])
        best, best_rate = Plan.plain(batch, Reason.NOT_WORTH), plain_rate
        for drafter, from_history, chances_BK in self._sources(state, requests):
            reach_BK = np.cumprod(chances_BK, axis=1)  # chance that this draft token is emitted
            reach_BK[np.arange(self.longest) >= left[:, None] - 1] = 0.0
            K_CB = self._candidates(weights[:, None] * reach_BK)
            if not len(K_CB):
                continue
            tau_BK = np.cumsum(np.pad(reach_BK, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
            history_CB = np.minimum(from_history, K_CB)
            draft, target = plan_seconds(self.costs, state.lengths, drafter, K_CB, history_CB)
            rates = rate(tau_BK[np.arange(batch), K_CB], draft + target)
            first = int(np.argmax(rates))
            if rates[first] > best_rate:
                best_rate = float(rates[first])
                K, history = K_CB[first], history_CB[first]
                ours = None if (history == K).all() else drafter
                best = Plan(K, history, ours, Reason.PAYS, best_rate / plain_rate)
        return best

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        self._clock += outcome.seconds
        for slot in state.slots[outcome.finished].tolist():
            del self._request[slot]

    def after_update(self) -> None:
        pass

    def forget(self, slots: np.ndarray) -> None:
        raise ValueError("an oracle follows one simulated run, in which nothing is aborted")

    def _requests(self, state: StepState) -> np.ndarray:
        """The request in each slot."""
        if not self._request:
            self._clock = max(self._clock, float(self.workload.arrivals[self._started]))
        for slot in state.slots.tolist():
            if slot not in self._request:
                self._request[slot] = self._started
                self._started += 1
        return np.array([self._request[slot] for slot in state.slots.tolist()])

    def _drain(
        self, state: StepState, requests: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """R [B], what waits for each slot included, and w [B] by rank in R."""
        arrived = int(np.searchsorted(self.workload.arrivals, self._clock, side="right"))
        lengths = pooled(left, self.workload.outputs[self._started : arrived])
        order = np.argsort(lengths, kind="stable")[::-1]  # the b longest are live together, for b = 1..B
        b = np.arange(1, len(left) + 1)
        halfway = (lengths[order] + np.append(lengths[order][1:], 0.0)) / 2
        context = np.cumsum(state.lengths[order]) + b * np.minimum(halfway, left[order])
        t = self.costs.target(b, b, context)
        K = np.arange(1, self.longest + 1)[:, None]
        positions = (state.outputs + left // 2)[:, None] + np.arange(self.longest)
        for name in state.drafters:
            chances = self.workload.drafters[name].at(requests, positions, self._clock)
            tau_K = 1 + np.cumsum(np.cumprod(chances, axis=1).mean(axis=0))
            seconds_Kb = K * self.costs.draft(name, b, context) + self.costs.target(b, b * (1 + K), context)
            t = np.minimum(t, (seconds_Kb / tau_K[:, None]).min(axis=0))
        return lengths, np.diff(t, prepend=0.0)[::-1]

    def _sources(
        self, state: StepState, requests: np.ndarray
    ) -> Iterator[tuple[str | None, np.ndarray, np.ndarray]]:
        """(drafter, tokens from history [B], chance of each draft token [B, K]) for every way to draft."""
        depth = np.arange(self.longest)
        positions = state.outputs[:, None] + depth
        nothing = np.zeros(len(requests), np.int64)
        chances = {
            name: self.workload.drafters[name].at(requests, positions, self._clock) for name in state.drafters
        }
        for name in state.drafters:
            yield name, nothing, chances[name]
        if state.matches is not None and state.matches.lengths.any():
            assert self.workload.history is not None
            matched = np.minimum(state.matches.lengths, self.longest)
            inside = depth < matched[:, None]
            history = self.workload.history.acceptance.at(requests, positions, self._clock)
            yield None, matched, np.where(inside, history, 0.0)
            for name in state.drafters:
                yield name, matched, np.where(inside, history, chances[name])

    def _candidates(self, values_BK: np.ndarray) -> np.ndarray:
        """Draft lengths worth trying, int64 [C, B]; values fall along every row, and 0 is not drafted for."""
        longest = (values_BK > 0).sum(axis=1)
        uniform = np.minimum(np.arange(1, longest.max(initial=0) + 1)[:, None], longest)
        worth = np.unique(values_BK[values_BK > 0])
        if len(values_BK) == 1 or not len(worth):
            return uniform
        least = np.quantile(worth, np.linspace(0.0, 1.0, self.thresholds))
        return np.concatenate((uniform, (values_BK >= least[:, None, None]).sum(axis=2)))


def _shared(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Every value replaced by the mean of its group."""
    _, index = np.unique(group, return_inverse=True)
    return (np.bincount(index, weights=values) / np.bincount(index))[index]


def pooled(left: np.ndarray, waiting: np.ndarray) -> np.ndarray:
    """Remaining lengths [B] once what waits for a slot is poured over the sequences done first, as water finds its
    level; float64 [B].

    Whoever is done before the last of the waiting could be is at that level too: hurrying it makes room for others
    and no more.
    """
    if not len(waiting):
        return left.astype(float)
    ordered = np.sort(left).astype(float)
    levels = (np.cumsum(ordered) + waiting.sum()) / np.arange(1, len(ordered) + 1)  # of the k shortest
    level = levels[int(np.argmax(levels <= np.append(ordered[1:], np.inf)))]
    return np.where(left <= level + waiting.max(), level, left)
