"""What passes between a speculation policy and whatever runs its plans: an engine, or the simulator.

Every array is NumPy and has one entry per live sequence, in the order of `StepState.slots`. A policy never sees
tokens, logits or a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from rollout_spec.policy.cost_model import PassCost

PLAIN = "plain"  # decoding without drafts
HISTORY = "history"  # the drafter without weights: text seen before (n-gram and suffix matches)


class Reason(str, Enum):
    """Why a step runs as it does; one of these stands in every row of a trace."""

    OFF = "off"  # speculation is switched off
    NO_DRAFTER = "no-drafter"  # no drafter is usable
    LAST_TOKEN = "last-token"  # nobody may emit more than one more token
    FIXED = "fixed"  # a fixed rule said so (baselines)
    PAYS = "pays"  # predicted to be faster than plain decoding by more than the margin
    STILL_PAYS = "still-pays"  # on already, and not predicted to be slower
    NOT_WORTH = "not-worth"  # no candidate is predicted to be faster by more than the margin
    EXPLORE = "explore"  # tried although not predicted best, within the exploration budget
    PROBE = "probe"  # a randomized plain step, to know the time really saved
    REFERENCE = "reference"  # a plain step to learn what plain decoding costs now
    BAD_COST = "bad-cost"  # the cost model answers zero, infinity or NaN: decode plainly


@dataclass(frozen=True)
class Matches:
    """What history proposes for each live sequence.

    Attributes:
        lengths: Tokens it could propose, int64 [B]; 0 where nothing matches.
        confidence: Expected acceptance of each of them given the ones before, float64 [B], in [0, 1].
    """

    lengths: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class StepState:
    """What is live before one decode pass.

    Attributes:
        slots: int64 [B], distinct; the same number means the same sequence from one step to the next, until it
            is reported finished.
        lengths: int64 [B], tokens known, prompt included: what attention reads.
        outputs: int64 [B], output tokens so far.
        allowed: int64 [B], output tokens still allowed, at least 1.
        drafters: Names of the drafters with weights that are usable now, in order of preference.
        matches: What history proposes, or None if there is no history.
        waiting: Sequences that wait for a slot or for memory.
        stoppable: Whether drafters with weights say how sure they are of each token and heed `Plan.stop`.
    """

    slots: np.ndarray
    lengths: np.ndarray
    outputs: np.ndarray
    allowed: np.ndarray
    drafters: tuple[str, ...] = ()
    matches: Matches | None = None
    waiting: int = 0
    stoppable: bool = False

    def take(self, index: np.ndarray) -> StepState:
        """The same for some of the sequences, in the order of `index`."""
        matches = self.matches
        if matches is not None:
            matches = Matches(matches.lengths[index], matches.confidence[index])
        arrays = (self.slots[index], self.lengths[index], self.outputs[index], self.allowed[index])
        return StepState(*arrays, self.drafters, matches, self.waiting, self.stoppable)


class Stop(Protocol):
    """Ends the drafting of a pass early, for all sequences or for some.

    Under rejection sampling a draft must count or not whatever it is: whether one is verified may hang on the leads of
    those before it, never on its own or on later ones. Steps that are run for others may go on past a sequence's end.

    Attributes:
        lengths: Tokens drafted so far that are to be verified, those of history left out, int64 [B].
    """

    lengths: np.ndarray

    def more(self, leads: np.ndarray) -> bool:
        """Whether another step is drafted.

        Args:
            leads: How sure the drafter was of what it drafted last for each of the first A sequences, float [A], at
                least 0 (larger is surer; NaN if it broke).
        """

    def take(self, index: np.ndarray, limits: np.ndarray) -> Stop:
        """A new one for some of the sequences, in the order of `index`, which draft at most `limits` tokens."""


@dataclass(frozen=True)
class Plan:
    """How to run one decode pass.

    The first `from_history[b]` of the `draft_lengths[b]` draft tokens of sequence b are history's, the others
    are drafted by `drafter`.

    Attributes:
        draft_lengths: K of every sequence, int64 [B], at least 0 and below `StepState.allowed`. All 0: plain
            decoding, and no drafter runs.
        from_history: int64 [B], at most `draft_lengths`.
        drafter: Name of the drafter with weights, or None if history drafts alone or nobody drafts.
        reason: Why.
        gain: Predicted speed over plain decoding (1.0 for plain; NaN where nothing was predicted).
        seconds: Predicted time of the pass (NaN where nothing was predicted).
        stop: Ends the drafter's drafting before `draft_lengths`, where the state says `stoppable`; None: it goes on.
        forecast: What the policy expects of the pass, in its own terms; it wants it back with the outcome, before which
            it may have planned others.
    """

    draft_lengths: np.ndarray
    from_history: np.ndarray
    drafter: str | None
    reason: Reason
    gain: float = float("nan")
    seconds: float = float("nan")
    stop: Stop | None = None
    forecast: object = None

    @classmethod
    def plain(
        cls, batch: int, reason: Reason, seconds: float = float("nan"), forecast: object = None
    ) -> Plan:
        """Decode one token of each of `batch` sequences."""
        zeros = np.zeros(batch, np.int64)
        return cls(zeros, zeros, None, reason, 1.0, seconds, forecast=forecast)

    @property
    def speculates(self) -> bool:
        """Whether anything is drafted."""
        return bool(self.draft_lengths.any())

    @property
    def mode(self) -> str:
        """`plain`, `history`, the drafter's name, or `history+<name>`."""
        if not self.speculates:
            return PLAIN
        if self.drafter is None:
            return HISTORY
        if not self.from_history.any():
            return self.drafter
        return f"{HISTORY}+{self.drafter}" if (self.draft_lengths > self.from_history).any() else HISTORY


@dataclass(frozen=True)
class StepOutcome:
    """What a pass did.

    Attributes:
        accepted: Draft tokens accepted, int64 [B].
        emitted: Tokens appended, int64 [B]: at most accepted + 1, fewer where the sequence ended inside.
        finished: Sequences that ended in this pass, bool [B].
        draft_seconds: Time spent drafting, 0 in a plain pass.
        target_seconds: The rest of the pass: the target, sampling, bookkeeping.
        decision_seconds: Time spent before it on the plan: what history matches, and the policy's own time.
        drafted: Tokens drafted behind history, those that `Plan.stop` took back included, int64 [B]; None: all that
            the plan has and no others.
        leads: How sure the drafter was of those, float32 [B, >= drafted.max()]; None where it does not say.
    """

    accepted: np.ndarray
    emitted: np.ndarray
    finished: np.ndarray
    draft_seconds: float
    target_seconds: float
    decision_seconds: float = 0.0
    drafted: np.ndarray | None = None
    leads: np.ndarray | None = None

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.target_seconds + self.decision_seconds


class SpeculationPolicy(Protocol):
    """Decides before every decode pass, and learns from what came of it."""

    def looks(self, batch: int) -> bool:
        """Whether the next plan, if it is for `batch` sequences, goes by what history matches.

        If not, `StepState.matches` may be None, and history is spared the search.
        """
        return True

    def plan(self, state: StepState) -> Plan:
        """The plan of the next pass. The runner may have to shorten drafts for lack of memory; it says so to
        `observe` by passing the plan it carried out."""

    def revise(self, plan: Plan, state: StepState) -> Plan:
        """The latest plan again, by what history matches now.

        For a runner that has to plan a pass before it knows the tokens of the one before: the drafts of a drafter are
        made by then, those of history are not, and this decides about them.
        """
        return plan

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        """Learn from a pass that was carried out."""

    def after_update(self) -> None:
        """The weights have changed: what was learnt about acceptance is older now."""

    def add_drafter(self, name: str, cost: PassCost) -> None:
        """Another drafter with weights may come up in `StepState.drafters`; `cost` is that of its step.

        It has a cache of its own, and first reads what it missed in passes in which it did not draft. One that takes the
        place of another is added, too; if it costs the same, what is known of the other is where it begins.
        """
        return

    def observe_shadow(self, drafter: str, slots: np.ndarray, accepted: np.ndarray) -> None:
        """One token drafted behind each of `slots` [B] was not used; `accepted` [B], 0 or 1, says what of it."""
        return

    def forget(self, slots: np.ndarray) -> None:
        """These sequences left unfinished (aborted or preempted); their slots may be used again."""


@dataclass(frozen=True)
class PassTiming:
    """One measured pass, for fitting a cost model.

    Attributes:
        kind: `target`, or a drafter's name.
        batch: Sequences, B.
        rows: Token rows computed: B in a plain pass or one drafter step, B + sum of K in a verify pass.
        kv_tokens: Context tokens of all sequences together.
        seconds: Duration. For a drafter: of one of its steps.
    """

    kind: str
    batch: int
    rows: int
    kv_tokens: int
    seconds: float


@dataclass(frozen=True)
class TraceStep:
    """One decode pass, as recorded in a trace.

    Attributes:
        step: Count of passes, from 0.
        time: Seconds since the trace began, at the start of the pass.
        batch, kv_tokens: Live sequences, and their context tokens together.
        mode: `plain`, `history`, a drafter's name, or `history+<name>`.
        drafted, accepted, emitted: Tokens, over the batch.
        longest: Largest K of the batch.
        draft_seconds: As in `StepOutcome`.
        target_seconds: The rest of the time, that of the decision included.
        reason, gain: As in `Plan`.
    """

    step: int
    time: float
    batch: int
    kv_tokens: int
    mode: str
    drafted: int
    accepted: int
    emitted: int
    longest: int
    draft_seconds: float
    target_seconds: float
    reason: str
    gain: float


@dataclass(frozen=True)
class TraceRequest:
    """One finished sample, as recorded in a trace.

    Attributes:
        request: Its id and index, as `id/index`.
        prompt_tokens, output_tokens: Lengths.
        started, finished: Seconds since the trace began.
        drafted, accepted: Draft tokens proposed and accepted.
    """

    request: str
    prompt_tokens: int
    output_tokens: int
    started: float
    finished: float
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Trace:
    """A recorded rollout. `about` holds machine, versions, model, seed and command."""

    about: dict[str, object]
    steps: tuple[TraceStep, ...]
    requests: tuple[TraceRequest, ...] = ()
    events: tuple[tuple[float, str], ...] = field(default=())  # (time, what happened), e.g. weight updates
