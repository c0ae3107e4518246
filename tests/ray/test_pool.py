"""The pool on a real Ray: the samples of one engine, whatever the number of engines and however many are lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pool_kills import CONFIG, COUPLED, PARAMS, POLICY, check, kill_in_mid_rollout, make_prompts, trajectories

from rollout_spec import EngineConfig, RolloutEngine
from rollout_spec.contracts import InvalidRequest, WeightError
from rollout_spec.integrations.ray.dispatch import LOSSES, PoolError
from rollout_spec.models.checkpoint import read_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_a_pool_draws_what_one_engine_draws(pool: Any) -> None:
    prompts = make_prompts(6, seed=1)
    alone = RolloutEngine.from_pretrained(POLICY, COUPLED)
    for _ in range(2):  # the second time with other ids, and placed by lengths seen
        assert trajectories(pool.generate(prompts * 2, PARAMS)) == trajectories(
            alone.generate(prompts * 2, PARAMS)
        )
    report = pool.report()
    assert report.exactness == "E2" and report.replaced == 0
    assert all(stats.generated_tokens > 0 for stats in report.engines)
    assert report.spec.accepted == sum(stats.spec.accepted for stats in report.engines) > 0


def test_an_engine_killed_in_mid_rollout_changes_nothing(pool: Any) -> None:
    check(kill_in_mid_rollout(pool, rounds=3))


def test_replay_under_fresh_ids_would_be_noticed(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = type(pool)._replace

    def forget_ids(self: Any, *arguments: Any) -> list[Any]:
        return [
            replace(g, requests=tuple(replace(r, request_id=r.request_id + "-again") for r in g.requests))
            for g in kept(self, *arguments)
        ]

    monkeypatch.setattr(type(pool), "_replace", forget_ids)
    with pytest.raises(AssertionError):
        check(kill_in_mid_rollout(pool, rounds=1))


def test_every_engine_gets_an_update_and_so_does_a_replacement(pool: Any) -> None:
    import ray

    prompts = make_prompts(6, seed=2)
    before = pool.generate(prompts, PARAMS, request_ids=list(map(str, range(6))))
    version = pool.report().version + 3
    weights = {name: tensor.float() * 1.05 for name, tensor in read_checkpoint(POLICY)}
    pool.update_weights(weights.items(), version=version)
    ray.kill(pool._actors[0])
    completions = pool.generate(prompts, PARAMS)
    alone = RolloutEngine.from_pretrained(POLICY, COUPLED)
    alone.update_weights(weights.items(), version=version)
    assert trajectories(completions) == trajectories(alone.generate(prompts, PARAMS))
    assert [c.token_ids for c in completions] != [c.token_ids for c in before]
    assert [stats.version for stats in pool.report().engines] == [version, version]
    with pytest.raises(WeightError):
        pool.update_weights(list(weights.items())[1:])
    assert pool.report().version == version
    pool.generate(prompts[:2], PARAMS)


def test_a_request_that_cannot_be_honoured_leaves_the_pool_at_work(pool: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompts"):
        pool.generate([[1, 2], [10**6]])
    with pytest.raises(InvalidRequest, match="seeds"):
        pool.generate(["1+2="], seeds=[1, 2])
    assert len(pool.generate(["1+2="], PARAMS)) == 4


def test_a_group_that_ends_every_engine_is_given_up(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = type(pool)._start

    def start_doomed(self: Any) -> Any:
        import ray

        actor = kept(self)
        ray.kill(actor)
        return actor

    import ray

    monkeypatch.setattr(type(pool), "_start", start_doomed)
    for actor in pool._actors:
        ray.kill(actor)
    with pytest.raises(PoolError, match=f"{LOSSES} engines were lost"):
        pool.generate(["1+2="], PARAMS)
    monkeypatch.undo()
    assert len(pool.generate(["1+2="], PARAMS)) == 4


def test_silence_is_an_error_and_a_closed_pool_says_so(cluster: None) -> None:
    from rollout_spec.integrations.ray.pool import EnginePool

    with EnginePool(POLICY, EngineConfig.from_dict(CONFIG), size=1, timeout=120) as pool:
        pool.timeout = 0.01
        with pytest.raises(PoolError, match=r"timeout=0\.01"):
            pool.generate(make_prompts(8, seed=3), PARAMS)
        pool.timeout = 120
        assert len(pool.generate(["1+2="], PARAMS)) == 4
    with pytest.raises(PoolError, match="closed"):
        pool.generate(["1+2="])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 0}, "size"),
        ({"timeout": 0}, "timeout"),
        ({"config": {"speculation": {"verifier": "rejection"}}}, "verifier"),
        ({"config": {"sped": 1}}, "sped"),
    ],
)
def test_mistakes_are_errors_at_start(changes: dict[str, Any], named: str) -> None:
    from rollout_spec.integrations.ray.pool import EnginePool

    with pytest.raises(InvalidRequest, match=named):
        EnginePool(POLICY, **changes)
