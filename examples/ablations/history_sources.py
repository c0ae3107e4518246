"""What history to draft from: a sample's own text, its siblings' too, or earlier epochs' as well?

    python examples/ablations/history_sources.py

No drafter with weights. Every repetition is an epoch: the weight version is bumped and the same prompts are sampled
anew, so the noise and the answers are other ones. The first epoch, which fills the histories, is not timed. Weights
keep their values, which favours earlier epochs a little.
"""

from collections.abc import Hashable
from functools import partial
from itertools import count

import numpy as np
from ablation import (
    HISTORY_TOKENS,
    Case,
    automatic,
    compare,
    cost_model,
    load_engine,
    model_folder,
    ragged_work,
    read_options,
)
from show import COLOURS, Figure, conclude, describe, draw_speedups, identity_check, speedup_table, title

from rollout_spec.drafters.history import SOURCES, History
from rollout_spec.models.checkpoint import read_checkpoint
from rollout_spec.policy.baselines import Off

AGAIN = "none (plain, again)"


class OwnText(History):
    """A sample matches its prompt and its own text."""

    _samples = count()

    def begin(
        self, slot: int, prompt: np.ndarray, output: np.ndarray | None = None, group: Hashable = None
    ) -> None:
        super().begin(slot, prompt, output, ("sample", next(self._samples)))


class ThisEpoch(History):
    """A sample matches its own text and that of the other samples of its prompt, of this policy version."""

    epoch = 0

    def begin(
        self, slot: int, prompt: np.ndarray, output: np.ndarray | None = None, group: Hashable = None
    ) -> None:
        super().begin(slot, prompt, output, (self.epoch, prompt.tobytes()))

    def after_update(self) -> None:
        super().after_update()
        self.epoch += 1


HISTORIES = {"own text": OwnText, "+ siblings": ThisEpoch, "+ earlier epochs": History}


def main() -> None:
    options = read_options("history_sources", __doc__, requests=4, group=4)
    engine = load_engine(options, drafter="none")
    costs = cost_model(engine, options, None)
    work = ragged_work(options)
    plain = Case.plain(work)
    histories = {name: make(HISTORY_TOKENS) for name, make in HISTORIES.items()}
    cases = [
        Case(name, work, automatic(costs, options), history=partial(histories.__getitem__, name))
        for name in histories
    ]
    warm: dict[str, np.ndarray] = {}

    def next_epoch() -> None:
        for name, history in histories.items():
            warm.setdefault(name, history.stats().right)
            history.after_update()
        engine.backend.policy, engine.backend.history = Off(), None
        engine.update_weights(read_checkpoint(model_folder(options)))

    pairs = [(plain, case) for case in (*cases, Case.plain(work, AGAIN))]
    found = compare(engine, options, pairs, next_epoch)
    rows = {name: comparison.to_dict() for name, comparison in found.items()}
    for name, history in histories.items():
        right = (history.stats().right - warm[name]).sum(1) / rows[name]["tokens"]
        rows[name]["share_of_tokens_history_had_right"] = dict(zip(SOURCES, right.round(4).tolist()))

    def draw(figure: Figure) -> None:
        title(figure, f"What history to draft from? ({options.requests} prompts × {options.group} samples)")
        left, right = figure.subplots(1, 2, width_ratios=(2, 3), sharey=True)
        for row, name in enumerate(histories):
            start = 0.0
            for (source, share), colour in zip(
                rows[name]["share_of_tokens_history_had_right"].items(), COLOURS
            ):
                left.barh(row, share, 0.5, start, color=colour, label=source if not row else None)
                start += share
        left.set(
            xlim=(0, 1), xlabel="tokens that history had right, by source\n(share of all, drafted or not)"
        )
        left.legend(
            frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0
        )
        draw_speedups(right, found, AGAIN)

    conclude(
        options,
        {**describe(engine, options), "epochs": options.repeats + 1, "baseline": "plain", "cases": rows},
        speedup_table(found),
        draw,
        identity_check(engine, found),
    )


if __name__ == "__main__":
    main()
