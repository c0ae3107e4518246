"""What verl imports in every one of its processes: the entry point of the group `verl.plugins`.

verl loads an entry point and calls nothing, so importing this module is what prepares the process. It is inert
unless `actor_rollout_ref.rollout.name=rollout_spec`, and importing it again changes nothing.
"""

from __future__ import annotations

from typing import Any

from rollout_spec.integrations.verl import compat

compat.install()


def __getattr__(name: str) -> Any:
    """`Rollout` and `Replica`, when verl looks them up: the first moment at which its version matters.

    Raises:
        UnsupportedVerl: The installed verl is not one that this plugin was written for.
    """
    if name == "Rollout":
        compat.check_version()
        from rollout_spec.integrations.verl.rollout import Rollout

        return Rollout
    if name == "Replica":
        compat.check_version()
        from rollout_spec.integrations.verl.replica import Replica

        return Replica
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
