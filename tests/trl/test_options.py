"""TRL's generation settings as sampling parameters, and the release check; TRL itself is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_spec import SamplingParams
from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.trl import compat
from rollout_spec.integrations.trl.options import sampling_params


def trainer(**args: Any) -> Any:
    settings = {
        "temperature": 0.9, "top_p": 0.95, "top_k": 0, "min_p": None, "repetition_penalty": 1.1,
        "max_completion_length": 64, "generation_kwargs": None,
    }  # fmt: skip
    return SimpleNamespace(args=SimpleNamespace(**(settings | args)), eos_token_ids=[3, 7])


def test_settings_become_sampling_parameters() -> None:
    assert sampling_params(trainer()) == SamplingParams(
        temperature=0.9,
        top_p=0.95,
        repetition_penalty=1.1,
        max_tokens=64,
        ignore_eos=True,
        stop_token_ids=(3, 7),
    )


def test_generation_kwargs_come_over_them() -> None:
    given = {"do_sample": False, "max_new_tokens": 8, "top_k": 5, "top_p": None}
    with pytest.raises(InvalidRequest, match="top_p"):
        sampling_params(trainer(generation_kwargs=given))
    params = sampling_params(trainer(generation_kwargs=given | {"top_p": 1.0, "do_sample": True}))
    assert (params.max_tokens, params.top_k, params.top_p, params.temperature) == (8, 5, 1.0, 0.9)
    assert sampling_params(trainer(generation_kwargs={"do_sample": False})).temperature == 0


def test_an_unknown_generation_argument_is_named() -> None:
    with pytest.raises(InvalidRequest, match="num_beams=4"):
        sampling_params(trainer(generation_kwargs={"num_beams": 4}))


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "0.29.0"])
def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    with pytest.raises(compat.UnsupportedTrl, match=f"{found}.*1.16"):
        compat.check_version()


def test_a_missing_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise compat.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", absent)
    with pytest.raises(compat.UnsupportedTrl, match="no trl"):
        compat.check_version()
