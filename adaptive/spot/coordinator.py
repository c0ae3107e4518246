"""The spot trainer's coordinator, as a state machine: a message in, a list of commands out.

No clock, no threads, no Ray; the payloads are opaque. Training goes in rounds: every idle worker begins with the same
agreed state, trains the same number of micro-batches, and contributes; the mean of the contributions is the next
agreed state. Who joins gets the agreed state with its first order. Who is needed elsewhere drops its round at once,
and the others go on. So nobody waits for anybody to stop, and what is evaluated, published or saved is always an
agreed state. (Local SGD: Stich 2019, arXiv 1805.09767.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from rollout_spec.adaptive.spot.messages import (
    Checkpoint,
    Command,
    Contribution,
    Evaluate,
    Evaluated,
    Found,
    FromWorker,
    Hello,
    Lost,
    Payload,
    Publish,
    Report,
    RolloutBegan,
    RolloutOver,
    Save,
    Say,
    Send,
    Status,
    Stop,
    ToCoordinator,
    ToWorker,
    Train,
)
from rollout_spec.contracts import invalid

GUARDS = frozenset(
    {
        "epoch",  # answers to an earlier coordinator do not count
        "known",  # nor does what a lost worker had sent
        "round",  # nor answers to an earlier order
        "reports",  # nothing is ordered before every known worker has reported
        "version",  # versions go on from the newest that a worker reports
        "left",  # a round does not wait for who has left it
        "lost",  # nor for the dead
        "open",  # training only while a rollout is under way
        "memory",  # and where it fits
        "better",  # only what is accepted more often is published
    }
)


class Phase(str, Enum):
    """What the group of idle workers is doing. `off`: it never will again."""

    WAITING = "waiting"
    TRAINING = "training"
    PUBLISHING = "publishing"
    OFF = "off"


@dataclass(frozen=True)
class SpotOptions:
    """How to train on idle workers.

    Attributes:
        micro_batches: Per round. A worker that is needed loses at most this many.
        publish_every: Rounds between two shadow checks.
        save_every: Rounds between two checkpoints (one is also written at each publication).
        min_gain: Acceptance by which a candidate must beat the drafter in force.
        patience: Rollouts without any idle worker after which the spot trainer stays off.

    Raises:
        InvalidRequest: One of them is out of range.
    """

    micro_batches: int = 8
    publish_every: int = 4
    save_every: int = 1
    min_gain: float = 0.0
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("micro_batches", "publish_every", "save_every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise invalid(name, value, "use an integer >= 1")
        if not -1 <= self.min_gain <= 1:
            raise invalid("min_gain", self.min_gain, "use a difference of two shares, within [-1, 1]")


@dataclass(frozen=True)
class View:
    """What is known of a worker.

    Attributes:
        report: Its last; None until it has answered this coordinator.
        barren: Why it could not train; such a worker is asked again after its next report.
    """

    report: Report | None = None
    barren: str = ""


class Coordinator:
    """Decides who trains, from which state, and what is published.

    Args:
        epoch: Larger than that of every coordinator before.
        checkpoint: The last one saved.
        mean: The mean of some states: of at least one.
        options: How to train.
        guards: All of them; a test takes one away to see that it is needed.

    Attributes:
        phase: What the group is doing.
        step: Rounds agreed on.
        version: Of the drafter in force.
        open: Whether a rollout is under way.
        views: What is known of each worker.
        group: Workers whose answers the present round waits for.
    """

    def __init__(
        self,
        epoch: int,
        checkpoint: Checkpoint,
        mean: Callable[[Sequence[Payload]], Payload],
        options: SpotOptions | None = None,
        *,
        guards: Collection[str] = GUARDS,
    ) -> None:
        self.epoch, self.options = epoch, options or SpotOptions()
        self.step, self.version = checkpoint.step, checkpoint.version
        self.phase, self.open = Phase.WAITING, False
        self.views: dict[str, View] = {}
        self.group: frozenset[str] = frozenset()
        self._state, self._tensors = checkpoint.state, checkpoint.tensors
        self._mean, self._guards = mean, guards
        self._round = 0
        self._answers: dict[str, Contribution | Evaluated] = {}
        self._idle_seen, self._without_idle = False, 0
        self._refused: frozenset[str] = frozenset()
        self._commands: list[Command] = []

    def handle(self, message: ToCoordinator) -> list[Command]:
        """Take note of a message; what to do about it, in order."""
        self._commands = []
        match message:
            case Found(worker):
                if worker not in self.views:
                    self.views[worker] = View()
                    self._send(worker, Hello(self.epoch))
            case Lost(worker):
                self.views.pop(worker, None)
                if "lost" in self._guards:
                    self._leave(worker)
            case RolloutBegan():
                self.open, self._idle_seen = True, False
            case RolloutOver():
                self._end_rollout()
            case _:
                if self._counts(message):
                    self._note(message)
        self._advance()
        return self._commands

    @property
    def quiet(self) -> bool:
        """Whether no worker trains, as far as is known."""
        busy = (Status.TRAINING, Status.PREEMPTING)
        known = [view.report.status for view in self.views.values() if view.report is not None]
        return not self.group and not any(status in busy for status in known)

    # --- taking note -----------------------------------------------------------------------------------

    def _counts(self, message: FromWorker) -> bool:
        current = message.epoch == self.epoch or "epoch" not in self._guards
        return current and (message.worker in self.views or "known" not in self._guards)

    def _note(self, message: FromWorker) -> None:
        worker = message.worker
        if isinstance(message, Report):
            self.views[worker] = View(message)
            if message.version > self.version and "version" in self._guards:
                self.version, self._tensors = message.version, None  # published, and the checkpoint lost
            if "left" in self._guards:
                self._leave(worker)
            if message.version < self.version and self._tensors is not None:
                self._send(worker, Publish(self.epoch, self.version, self._tensors))
            self._idle_seen |= message.status is Status.IDLE and self.open
        elif message.round == self._round or "round" not in self._guards:
            self._answers[worker] = message
            if message.reason:
                self.views[worker] = replace(self.views[worker], barren=message.reason)
                self._commands.append(Say(f"{worker} cannot train the drafter now: {message.reason}"))

    def _leave(self, worker: str) -> None:
        self.group -= {worker}

    def _end_rollout(self) -> None:
        if self.open and self.phase is not Phase.OFF:
            self._without_idle = 0 if self._idle_seen else self._without_idle + 1
        self.open = False
        self._dissolve()
        if self._without_idle >= self.options.patience and self.phase is not Phase.OFF:
            self.phase = Phase.OFF
            self._commands.append(
                Say(
                    f"no worker was idle in the last {self._without_idle} rollouts: spot training stays off; train "
                    "the drafter offline, or give the trainer rollouts that it waits for"
                )
            )

    def _dissolve(self) -> None:
        """Stop the group; its round is void."""
        if "open" not in self._guards:
            return
        for worker in sorted(self.group - self._answers.keys()):
            self._send(worker, Stop(self.epoch))
            view = self.views[worker]
            self.views[worker] = replace(view, report=replace(self._report(worker), status=Status.PREEMPTING))
        self.group, self._answers = frozenset(), {}
        self._round += 1
        self._rest()

    # --- what follows ----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Begin a round, or end the one that everybody has answered."""
        if "reports" in self._guards and any(view.report is None for view in self.views.values()):
            return
        if self.phase is Phase.WAITING:
            self._begin(Phase.TRAINING)
        elif self.phase is not Phase.OFF and self.group <= self._answers.keys():
            if self.phase is Phase.TRAINING:
                self._agree()
            else:
                self._decide()

    def _begin(self, phase: Phase) -> None:
        """Order the next round from every idle worker that can take part."""
        self._answers, self.group = {}, frozenset()
        self._rest()
        if not self.open and "open" in self._guards:
            return
        group = [worker for worker in sorted(self.views) if self._can_train(worker)]
        if self._state is None:
            group = group[:1]  # its state becomes everybody's
        if not group:
            return
        self.phase, self.group = phase, frozenset(group)
        self._round += 1
        for worker in group:
            place = self.epoch, self._round, self._report(worker).number
            if phase is Phase.TRAINING:
                self._send(worker, Train(*place, self._state, self.options.micro_batches))
            else:
                self._send(worker, Evaluate(*place, self._state, lead=worker == group[0]))

    def _can_train(self, worker: str) -> bool:
        view = self.views[worker]
        report = view.report
        if report is None or report.status is not Status.IDLE or view.barren:
            return False
        if report.needed_bytes > report.free_bytes and "memory" in self._guards:
            if worker not in self._refused:
                self._refused |= {worker}
                self._commands.append(
                    Say(
                        f"{worker} does not train: training takes {report.needed_bytes} bytes and "
                        f"{report.free_bytes} are free beside its KV cache; make the cache or the drafter smaller"
                    )
                )
            return False
        self._refused -= {worker}
        return True

    def _agree(self) -> None:
        """The contributions' mean is the next agreed state."""
        states = [
            answer.state
            for _, answer in sorted(self._answers.items())
            if isinstance(answer, Contribution) and answer.state is not None
        ]
        if not states:
            return self._begin(Phase.TRAINING)
        self._idle_seen = True
        self._state = self._mean(states)
        self.step += 1
        if self.step % self.options.save_every == 0:
            self._save()
        due = self.step % self.options.publish_every == 0
        return self._begin(Phase.PUBLISHING if due else Phase.TRAINING)

    def _decide(self) -> None:
        """Publish the candidate if the contexts speak for it, of workers with a drafter in force where there are such."""
        answers = [answer for answer in self._answers.values() if isinstance(answer, Evaluated)]
        tensors = next((answer.tensors for answer in answers if answer.tensors is not None), None)
        judges = [answer for answer in answers if answer.current is not None and answer.tokens] or answers
        tokens = sum(answer.tokens for answer in judges)
        if tensors is not None and tokens:
            candidate = sum(answer.candidate * answer.tokens for answer in judges) / tokens
            current = sum((answer.current or 0.0) * answer.tokens for answer in judges) / tokens
            compared = f"acceptance {candidate:.3f} against {current:.3f} on {tokens} held-out tokens"
            if candidate > current + self.options.min_gain or "better" not in self._guards:
                self._publish(tensors)
                self._commands.append(Say(f"drafter version {self.version} published: {compared}"))
            else:
                self._commands.append(Say(f"drafter of step {self.step} kept back: {compared}"))
        else:
            self._commands.append(Say(f"drafter of step {self.step} kept back: nobody could judge it"))
        self._begin(Phase.TRAINING)

    def _publish(self, tensors: Payload) -> None:
        self.version += 1
        self._tensors = tensors
        self._save()
        for worker in sorted(self.views):
            self._send(worker, Publish(self.epoch, self.version, self._tensors))

    # --- small change ----------------------------------------------------------------------------------

    def _rest(self) -> None:
        if self.phase is not Phase.OFF:
            self.phase = Phase.WAITING

    def _save(self) -> None:
        saved = Checkpoint(self.epoch, self.step, self._state, self.version, self._tensors)
        self._commands.append(Save(saved))

    def _send(self, worker: str, message: ToWorker) -> None:
        self._commands.append(Send(worker, message))

    def _report(self, worker: str) -> Report:
        report = self.views[worker].report
        assert report is not None  # only workers that have reported are given orders
        return report
