"""The entry point that vLLM calls in every one of its processes."""

from __future__ import annotations


def register() -> None:
    """Prepare this process; inert for engines that are not configured for rollout-spec, and idempotent."""
