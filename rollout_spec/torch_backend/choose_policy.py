"""From the configuration to the policy that decides before every pass."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from rollout_spec.drafters.history import History
from rollout_spec.policy import calibration
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off
from rollout_spec.policy.calibration import Calibration
from rollout_spec.policy.records import SpeculationPolicy
from rollout_spec.torch_backend.calibrate import BRIEF, calibration_key, measure

if TYPE_CHECKING:
    from rollout_spec.torch_backend.backend import TorchBackend

logger = logging.getLogger("rollout_spec")


def choose_policy(backend: TorchBackend) -> tuple[SpeculationPolicy, History | None, Calibration | None]:
    """Fixed draft lengths if the configuration says so, else decisions from measured costs.

    Returns:
        The policy, what remembers text for it, and the costs it goes by.
    """
    options, drafter = backend.config.speculation, backend.weights.drafter
    if options.draft_length is not None:
        drafts = drafter is not None or options.adaptive
        return (Fixed(options.draft_length) if drafts else Off()), None, None
    if drafter is None and not options.history and not options.adaptive:
        return Off(), None, None
    found = _calibration(backend)
    if found is None:
        return Off(), None, None
    policy = AutomaticPolicy(
        found.cost_model,
        objective=options.objective,
        longest=options.longest_draft,
        margin=options.margin,
        probe_share=options.probe_share,
        explore_share=options.explore_share,
        seed=backend.config.seed,
    )
    return policy, History(options.history_tokens) if options.history else None, found


def _calibration(backend: TorchBackend) -> Calibration | None:
    """The one kept for this model on this machine, else a brief one made now; None if there is no room for it."""
    key = calibration_key(backend)
    found = calibration.cached(key)
    if found is not None:
        return found
    began = time.perf_counter()
    timings = measure(backend, BRIEF)
    if not timings:
        logger.warning(
            "decoding plainly: max_model_len=%d and kv_cache_tokens=%d leave no room to measure what passes cost; "
            "raise them, or set speculation.draft_length",
            backend.max_model_len,
            backend.kv_tokens,
        )
        return None
    found = Calibration.of(key, timings, brief=True)
    calibration.write(found, calibration.cache_path(key))
    logger.warning(
        "calibrated briefly, in %.1f s: nothing was known of this model on this machine; "
        "`rollout-spec calibrate MODEL`, run once while the machine is idle, makes better decisions",
        time.perf_counter() - began,
    )
    return found
