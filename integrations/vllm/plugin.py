"""The entry point that vLLM calls in every one of its processes."""

from __future__ import annotations

import logging

from rollout_spec.integrations.vllm import compat

logger = logging.getLogger("rollout_spec")


def register() -> None:
    """Prepare this process; inert for engines that are not configured for rollout-spec, and idempotent.

    Under an unsupported vLLM nothing is touched and a warning says so; an engine that asks for the plugin then fails
    with the same message, others run on.
    """
    try:
        compat.install()
    except compat.UnsupportedVllm as error:
        logger.warning("the rollout-spec plugin is switched off: %s", error)
