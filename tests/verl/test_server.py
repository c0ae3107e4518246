"""The server's methods, called in this process as verl's replicas, clients and workers call the actor's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

pytest.importorskip("verl")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from verl.workers.config import HFModelConfig, RolloutConfig  # noqa: E402
from verl.workers.rollout.replica import RolloutMode, TokenOutput  # noqa: E402
from verl_runs import POLICY  # noqa: E402

from rollout_spec.contracts import InvalidRequest, WeightError  # noqa: E402
from rollout_spec.integrations.verl.metrics import ServerFigures  # noqa: E402
from rollout_spec.integrations.verl.server import RolloutServer  # noqa: E402
from rollout_spec.integrations.verl.spot import IdleTraining  # noqa: E402
from rollout_spec.integrations.verl.transport import send  # noqa: E402

PARAMS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
LONG = {**PARAMS, "ignore_eos": True}
SPECULATION = {"drafter": "int8", "draft_length": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return HFModelConfig(path=str(POLICY), override_config={"attn_implementation": "eager"})


def rollout(**changes: Any) -> RolloutConfig:
    fields = {
        "name": "rollout_spec",
        "prompt_length": 64,
        "response_length": 120,
        "max_num_seqs": 16,
        "dtype": "float32",
        "tensor_model_parallel_size": 1,
        "engine_kwargs": {"rollout_spec": {"speculation": SPECULATION}},
    }
    return RolloutConfig(**{**fields, **changes})


@pytest.fixture
def server(model: Any) -> RolloutServer:
    return RolloutServer(rollout(), model, 0, RolloutMode.HYBRID)


@pytest.fixture(scope="module")
def prompt(model: Any) -> list[int]:
    return list(model.tokenizer("17+5+20+11+3=")["input_ids"])


def weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.float() for name, tensor in load_file(POLICY / "model.safetensors").items()}
    head = tensors["model.embed_tokens.weight"].mul_(scale)
    return {**tensors, "lm_head.weight": head}  # as verl sends it: tied, and named twice


async def update(server: RolloutServer, version: int, tensors: dict[str, torch.Tensor]) -> None:
    """What `Rollout.update_weights` does."""

    async def pairs() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for pair in tensors.items():
            yield pair

    if await server.begin_update(version):
        await send(pairs(), server.take, 1 << 20, CPU)
        await server.finish_update(version)


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 60))


def test_requests_wait_for_the_first_weights_and_share_the_batch(
    server: RolloutServer, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    step = server.engine.backend.step
    monkeypatch.setattr(server.engine.backend, "step", lambda: (steps.append(None), step())[1])

    async def scenario() -> list[TokenOutput]:
        asked = [asyncio.create_task(server.generate(prompt, dict(PARAMS), "same id")) for _ in range(8)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in asked)
        await update(server, 0, weights())
        return await asyncio.gather(*asked)

    outputs = run(scenario)
    assert len({tuple(output.token_ids) for output in outputs}) > 1, (
        "one id and one prompt, and samples of their own"
    )
    drafted = sum(output.extra_fields["spec_num_draft_tokens"] for output in outputs)
    spec = server.engine.stats().spec
    assert drafted == spec.drafted > 0
    assert len(steps) < sum(len(output.token_ids) for output in outputs) / 8, (
        "eight together, and drafts besides"
    )
    for output in outputs:
        assert len(output.log_probs) == len(output.token_ids) and max(output.log_probs) <= 0
        expected = server.engine.logprobs([*prompt, *output.token_ids])[len(prompt) - 1 :]
        assert output.log_probs == pytest.approx(expected, abs=1e-4)
        assert output.stop_reason == "completed" and output.extra_fields["global_steps"] == 0


def test_a_tool_speaks_in_between(server: RolloutServer, prompt: list[int]) -> None:
    """Turns of one conversation: the same id, tokens of a tool at any offset, a limit per turn."""

    async def scenario() -> None:
        await update(server, 0, weights())
        for offset in (1, 2, 5, 16, 31):
            context = list(prompt)
            for turn in range(3):
                limit = {**LONG, "max_tokens": offset}
                output = await server.generate(list(context), limit, "conversation")
                assert len(output.token_ids) == offset
                whole = [*context, *output.token_ids]
                expected = server.engine.logprobs(whole)[len(context) - 1 :]
                assert output.log_probs == pytest.approx(expected, abs=1e-4)
                context = [*whole, *prompt[: 1 + turn]]

    run(scenario)


def test_request_level_parameters(server: RolloutServer, prompt: list[int]) -> None:
    async def scenario() -> list[TokenOutput]:
        await update(server, 0, weights())
        greedy = {**PARAMS, "temperature": 0}
        stops = {**LONG, "stop_token_ids": [prompt[-1]]}  # the character "="
        plain = {**PARAMS, "logprobs": False, "max_tokens": 5}
        return list(
            await asyncio.gather(
                *(server.generate(prompt, dict(p), "id") for p in (greedy, greedy, stops, plain))
            )
        )

    first, second, stopped, plain = run(scenario)
    assert first.token_ids == second.token_ids
    assert stopped.token_ids[-1] == prompt[-1]
    assert plain.log_probs is None and len(plain.token_ids) <= 5
    assert len(first.token_ids) <= 120


def test_an_interrupted_answer_goes_on_under_the_next_policy(
    server: RolloutServer, prompt: list[int]
) -> None:
    async def scenario() -> tuple[TokenOutput, TokenOutput, TokenOutput]:
        await update(server, 0, weights())
        asked = asyncio.create_task(server.generate(prompt, dict(LONG), "id"))
        while not server.engine.stats().generated_tokens:
            await asyncio.sleep(0.001)
        assert await server.abort_all_requests() == {"aborted_count": 1}
        partial = await asked
        held = asyncio.create_task(server.generate([*prompt, *partial.token_ids], dict(LONG), "id"))
        await asyncio.sleep(0.05)
        assert not held.done(), "nothing starts between interruption and resumption"
        await server.abort_all_requests(reject_request=True)
        rejected = await held
        await server.release_kv_cache()
        await update(server, 1, weights(0.9))
        await server.resume_kv_cache()
        await server.resume_generation()
        return partial, rejected, await server.generate([*prompt, *partial.token_ids], dict(LONG), "id")

    partial, rejected, rest = run(scenario)
    assert partial.stop_reason == "aborted" and 0 < len(partial.token_ids) < 120
    assert partial.extra_fields["version_spans"] == [(0, len(partial.token_ids), 0)]
    assert rejected.stop_reason == "aborted" and rejected.token_ids == []
    assert (
        rest.extra_fields["version_spans"] == [(0, len(rest.token_ids), 1)]
        and rest.stop_reason == "completed"
    )


def test_an_update_in_the_middle_of_an_answer(server: RolloutServer, prompt: list[int]) -> None:
    """Nothing interrupts: the answer goes on, and says which token came from which policy."""

    async def scenario() -> TokenOutput:
        await update(server, 0, weights())
        asked = asyncio.create_task(server.generate(prompt, dict(LONG), "id"))
        while not server.engine.stats().generated_tokens:
            await asyncio.sleep(0.001)
        await update(server, 3, weights(0.9))
        return await asked

    output = run(scenario)
    fields = output.extra_fields
    assert [version for _, _, version in fields["version_spans"]] == [0, 3]
    assert (fields["min_global_steps"], fields["max_global_steps"]) == (0, 3)
    assert fields["version_spans"][-1][1] == len(output.token_ids)


def test_sleep_frees_memory_and_requests_wait(server: RolloutServer, prompt: list[int]) -> None:
    async def scenario() -> tuple[TokenOutput, TokenOutput]:
        await update(server, 4, weights())
        before = await server.generate(prompt, {**PARAMS, "temperature": 0}, "id")
        await server.sleep()
        assert server.engine.backend.cache.nbytes == 0
        asked = asyncio.create_task(server.generate(prompt, {**PARAMS, "temperature": 0}, "id"))
        await server.wake_up(["weights"])
        await update(server, 4, weights())  # the same version again, for its weights are gone
        await asyncio.sleep(0.05)
        assert not asked.done() and server.engine.backend.cache.nbytes == 0
        await server.wake_up(["kv_cache"])
        return before, await asked

    before, after = run(scenario)
    assert before.token_ids == after.token_ids


def test_a_version_in_force_is_not_sent_twice(server: RolloutServer) -> None:
    async def scenario() -> None:
        await update(server, 2, weights())
        assert not await server.begin_update(2)
        assert await server.begin_update(3)
        await server.cancel_update("changed my mind")

    run(scenario)


@pytest.mark.parametrize(("mode", "sleeps"), [(RolloutMode.STANDALONE, False), (RolloutMode.COLOCATED, True)])
def test_who_shares_the_device(model: Any, prompt: list[int], mode: RolloutMode, sleeps: bool) -> None:
    server = RolloutServer(rollout(), model, 0, mode)

    async def scenario() -> None:
        await update(server, 0, weights())
        await server.sleep()
        assert (server.engine.backend.cache.nbytes == 0) is sleeps
        await server.wake_up()
        assert (await server.generate(prompt, dict(PARAMS), "id")).token_ids, "its weights are kept"

    run(scenario)


def test_an_update_that_fails_leaves_the_policy(server: RolloutServer, prompt: list[int]) -> None:
    async def scenario() -> None:
        await update(server, 0, weights())
        broken = weights() | {"model.norm.weight": torch.zeros(3)}
        with pytest.raises(WeightError, match=r"model\.norm\.weight"):
            await update(server, 1, broken)
        output = await server.generate(prompt, dict(PARAMS), "id")
        assert output.extra_fields["global_steps"] == 0
        await update(server, 1, weights())
        assert (await server.generate(prompt, dict(PARAMS), "id")).extra_fields["global_steps"] == 1

    run(scenario)


def test_what_cannot_be_honoured_is_refused_and_others_go_on(
    server: RolloutServer, prompt: list[int]
) -> None:
    async def scenario() -> None:
        await update(server, 0, weights())
        good = asyncio.create_task(server.generate(prompt, dict(PARAMS), "id"))
        with pytest.raises(InvalidRequest, match="image_data"):
            await server.generate(prompt, dict(PARAMS), "id", image_data=["picture"])
        with pytest.raises(InvalidRequest, match="typo"):
            await server.generate(prompt, {**PARAMS, "typo": 1}, "id")
        with pytest.raises(InvalidRequest, match="184"):
            await server.generate(prompt * 20, dict(PARAMS), "id")
        assert (await good).token_ids

    run(scenario)


def test_verls_own_mistakes_are_found_at_start(model: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"rollout\.tensor_model_parallel_size=2"):
        RolloutServer(rollout(tensor_model_parallel_size=2), model, 0, RolloutMode.HYBRID)
    with pytest.raises(InvalidRequest, match=r"rollout_spec\.drafter='int8': unknown option"):
        RolloutServer(
            rollout(engine_kwargs={"rollout_spec": {"drafter": "int8"}}), model, 0, RolloutMode.HYBRID
        )


# --- spot training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def training_server(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[RolloutServer]:
    """A server that trains a drafter, until the test ends; `overlaps` counts engine steps beside a micro-batch.

    With `linger` the next micro-batch lasts until the engine's next step, for 20 seconds at most.
    """
    spot = {"batch_tokens": 64, "publish_every": 1}
    options = {"rollout_spec": {"speculation": SPECULATION, "spot_training": spot}}
    server = RolloutServer(rollout(engine_kwargs=options), model, 0, RolloutMode.HYBRID)
    server.overlaps, server.linger, server.lingering = 0, False, threading.Event()
    trainee, backend = server.idle_training.spot.host.trainee, server.engine.backend
    train, step, training, stepped = trainee.micro_step, backend.step, threading.Event(), threading.Event()

    def micro_step() -> float | None:
        stepped.clear()
        training.set()
        try:
            if server.linger:
                server.linger = False
                server.lingering.set()
                stepped.wait(20)
            return train()
        finally:
            training.clear()

    def watched_step() -> Any:
        server.overlaps += training.is_set()
        stepped.set()
        return step()

    monkeypatch.setattr(trainee, "micro_step", micro_step)
    monkeypatch.setattr(backend, "step", watched_step)
    yield server
    asyncio.run(IdleTraining.need(server.idle_training))  # also where a test has made it wait for nothing


def micro_batches(server: RolloutServer) -> int:
    return len(server.idle_training.spot.host.times.micro_batches)


async def trained_on(server: RolloutServer) -> bool:
    """Whether it goes on training."""
    before = micro_batches(server)
    for _ in range(60):
        await asyncio.sleep(0.05)
        if micro_batches(server) > before + 1:
            return True
    return False


async def ask(server: RolloutServer, prompt: list[int]) -> None:
    await asyncio.gather(*(server.generate(prompt, dict(PARAMS), "id") for _ in range(8)))


def test_a_drafter_is_trained_while_nothing_is_in_flight(
    training_server: RolloutServer, prompt: list[int]
) -> None:
    server = training_server

    async def scenario() -> ServerFigures:
        await update(server, 0, weights())
        assert not micro_batches(server), "there is nothing to train on yet"
        for _ in range(4):
            await ask(server, prompt)
            assert await trained_on(server)
        assert server.overlaps == 0, "a request waits for the end of the micro-batch"
        for lent, back in ((server.sleep, wake), (server.abort_all_requests, server.resume_generation)):
            await lent()
            assert not await trained_on(server)
            await back()
            assert await trained_on(server)
        for _ in range(400):  # whole rounds, without a break
            if server.idle_training.version:
                break
            await asyncio.sleep(0.1)
        return await server.rollout_spec_figures()

    async def wake() -> None:
        await server.wake_up(["weights"])
        await update(server, 1, weights())
        assert not await trained_on(server)
        await server.wake_up(["kv_cache"])

    figures = run(scenario)
    longest = max(server.idle_training.spot.host.times.micro_batches)
    assert 0 < figures.used_seconds <= figures.idle_seconds + longest * 10
    assert figures.adaptive_version >= 1, "what was trained is in force"


def test_training_beside_a_request_would_be_seen(
    training_server: RolloutServer, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = training_server

    async def nothing() -> None: ...

    async def scenario() -> None:
        await update(server, 0, weights())
        await ask(server, prompt)
        assert await trained_on(server)
        monkeypatch.setattr(server.idle_training, "need", nothing)
        server.linger = True
        server.idle_training.allow()
        while not server.lingering.is_set():
            await asyncio.sleep(0.01)
        await ask(server, prompt)

    run(scenario)
    assert server.overlaps > 0
