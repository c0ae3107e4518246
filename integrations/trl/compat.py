"""Which TRL this fits. Nothing of it is changed; `rollout_func` is experimental there, so its release is checked."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from rollout_spec.contracts import RolloutSpecError

SUPPORTED = SpecifierSet("==1.16.*")


class UnsupportedTrl(RolloutSpecError, RuntimeError):
    """No TRL is installed, or one whose `rollout_func` this was not written for."""


def check_version() -> str:
    """The installed TRL's version; UnsupportedTrl, naming the supported range, if it is outside of it."""
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise UnsupportedTrl(f"no trl is installed; install trl{SUPPORTED}") from error
    if not SUPPORTED.contains(found, prereleases=True):
        raise UnsupportedTrl(f"trl=={found}: this rollout_func supports trl{SUPPORTED}; install that version")
    return found
