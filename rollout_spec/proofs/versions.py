"""Does every token carry the policy version it was sampled under, also when the weights change on the way?"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from rollout_spec.contracts import Completion, VersionSpan
from rollout_spec.engine import RolloutEngine
from rollout_spec.policy.baselines import Fixed
from rollout_spec.policy.records import Plan, Reason, StepState
from rollout_spec.proofs.runs import Requests, mode

PAUSE_AT = 2  # the decode pass that waits for the new weights
REPLAYED = 4  # interrupted sequences whose rest is sampled again
PATIENCE = 600.0  # seconds until a stuck update ends the wait


def wrongly_versioned(completions: Sequence[Completion], version: int) -> int:
    """Completions of which not every token is of `version`."""
    return sum(c.version_spans != [VersionSpan(0, len(c.token_ids), version)] for c in completions)


@dataclass(frozen=True)
class Interrupted:
    """An update while sequences were being decoded.

    Attributes:
        version: The version it ended with.
        split: Sequences with tokens of both versions.
        wrong_spans: Sequences whose spans leave a gap, or go back, or name another version.
        wrong_before: Sequences whose tokens before the update are not the old policy's.
        replayed, wrong_after: Split sequences whose rest was sampled anew from where the update fell, under the
            same id, and those of them whose rest was another one.
    """

    version: int
    split: int
    wrong_spans: int
    wrong_before: int
    replayed: int
    wrong_after: int


class _Pause(Fixed):
    """Holds the engine at one pass until the new weights have arrived, and decodes plainly until they are in force.

    Before and after it drafts `draft_length` tokens.
    """

    def __init__(self, engine: RolloutEngine, draft_length: int) -> None:
        self._weights, self._old = engine.backend.weights, engine.backend.weights.version
        self._in_place = engine.backend.updates_in_place
        super().__init__(draft_length)
        self._passes = 0
        self.reached, self.arrived = threading.Event(), threading.Event()

    def plan(self, state: StepState) -> Plan:
        self._passes += 1
        if self._passes == PAUSE_AT:
            self.reached.set()
            self.arrived.wait(PATIENCE)
        if self.arrived.is_set() and self._weights.version == self._old:
            return Plan.plain(len(state.slots), Reason.OFF)
        return super().plan(state)

    def deliver(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, once the engine holds; the engine goes on after the last of them.

        A backend that overwrites its weights in place has to stop for that: there it goes on after the first.
        """
        self.reached.wait(PATIENCE)
        try:
            for pair in weights:
                yield pair
                if self._in_place:
                    self.arrived.set()
        finally:
            self.arrived.set()


def update_in_flight(
    engine: RolloutEngine,
    requests: Requests,
    plain: Sequence[Completion],
    weights: Iterable[tuple[str, Tensor]],
    draft_length: int,
) -> Interrupted:
    """Update the weights while `requests` are decoded.

    `plain` is what the version in force gives without the update. End tokens are ignored here, so that no
    sequence ends before the update.
    """
    old = engine.backend.weights.version
    params = [replace(p, ignore_eos=True) for p in requests.params]
    policy = _Pause(engine, draft_length)
    with mode(engine, policy), ThreadPoolExecutor(1) as background:
        running = background.submit(engine.generate, requests.prompts, params, request_ids=requests.ids)
        running.add_done_callback(lambda _: policy.reached.set())
        try:
            version = engine.update_weights(policy.deliver(weights)).version
        finally:
            policy.arrived.set()
        done = running.result()
    wrong_spans = wrong_before = 0
    split = []
    for row, (before, now) in enumerate(zip(plain, done, strict=True)):
        spans = now.version_spans
        edges = [0, *(span.stop for span in spans)]
        versions = [span.version for span in spans]
        wrong_spans += (
            [span.start for span in spans] != edges[:-1]
            or edges[-1] != len(now.token_ids)
            or versions not in ([old], [version], [old, version])
        )
        kept = spans[0].stop if versions[0] == old else 0
        comparable = min(kept, len(before.token_ids))
        wrong_before += now.token_ids[:comparable] != before.token_ids[:comparable]
        if versions == [old, version]:
            split.append(row)
    replayed = split[:REPLAYED]
    wrong_after = 0
    for row in replayed:
        cut = done[row].version_spans[0].stop
        output = done[row].token_ids
        left = replace(params[row], max_tokens=len(output) - cut)
        (rest,) = engine.generate(
            [requests.prompts[row] + output[:cut]], left, request_ids=[requests.ids[row]]
        )
        wrong_after += rest.token_ids != output[cut:]
    return Interrupted(version, len(split), wrong_spans, wrong_before, len(replayed), wrong_after)
