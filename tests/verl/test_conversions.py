"""verl's requests and answers, and the weights' way, without verl."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_configs import model_config, rollout_config

from rollout_spec import Completion, SamplingParams
from rollout_spec.contracts import FinishReason, InvalidRequest, SpecCounts, VersionSpan, WeightError
from rollout_spec.integrations.verl.conversions import join_extra_fields, to_sampling_params, to_token_output
from rollout_spec.integrations.verl.options import read_options
from rollout_spec.integrations.verl.transport import ALIGNMENT, Bucket, send
from rollout_spec.integrations.verl.weights import WeightStream

VERLS = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
OPTIONS = read_options(rollout_config(), model_config())  # 64 prompt tokens, 128 of an answer


def test_what_verl_asks_for() -> None:
    params, wants_logprobs = to_sampling_params(VERLS, 64, OPTIONS)
    assert params == SamplingParams(temperature=0.7, top_p=0.9, top_k=-1, max_tokens=128) and wants_logprobs


@pytest.mark.parametrize(
    ("given", "prompt_length", "limit"),
    [({}, 10, 128), ({}, 100, 92), ({}, 192, 1), ({"max_tokens": 7}, 10, 7), ({"max_new_tokens": 8}, 10, 8)],
)
def test_the_limit_of_an_answer(given: dict[str, Any], prompt_length: int, limit: int) -> None:
    """Prompt and answer share both budgets, as verl has it: later turns of a conversation have long prompts."""
    assert to_sampling_params(given, prompt_length, OPTIONS)[0].max_tokens == limit


def test_defaults_come_from_the_configuration() -> None:
    options = read_options(rollout_config(repetition_penalty=1.2, ignore_eos=True), model_config())
    params, wants_logprobs = to_sampling_params({"stop": None}, 8, options)
    assert params.repetition_penalty == 1.2 and params.ignore_eos and not wants_logprobs
    assert to_sampling_params({"repetition_penalty": 1.1}, 8, options)[0].repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"temprature": 1}, "temprature"),
        ({"top_p": 2.0}, "top_p"),
        ({"n": 4}, "n=4"),
        ({"logprobs": 5}, "logprobs=5"),
    ],
)
def test_a_parameter_that_cannot_be_honoured(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"sampling_params\.{field}"):
        to_sampling_params(given, 8, OPTIONS)


def completion(tokens: int, spans: list[VersionSpan], finish: FinishReason = FinishReason.STOP) -> Completion:
    counts = SpecCounts(drafted=8, accepted=6, verify_steps=2, plain_steps=1)
    return Completion(
        "id", 0, [1], list(range(tokens)), "", [-1.0] * tokens, [-2.0] * tokens, [1.0] * tokens, None, finish, None,
        spans, counts,
    )  # fmt: skip


def test_an_answer() -> None:
    fields = to_token_output(
        completion(3, [VersionSpan(0, 2, 4), VersionSpan(2, 3, 5)]), 5, "processed_logprobs"
    )
    assert fields["token_ids"] == [0, 1, 2] and fields["log_probs"] == [-2.0] * 3
    assert fields["stop_reason"] == "completed"
    assert fields["extra_fields"] == {
        "global_steps": 5,
        "min_global_steps": 4,
        "max_global_steps": 5,
        "version_spans": [(0, 2, 4), (2, 3, 5)],
        "spec_num_draft_tokens": 8,
        "spec_num_accepted_tokens": 6,
        "spec_num_verify_steps": 2,
        "spec_num_plain_steps": 1,
    }
    assert to_token_output(completion(3, []), 5, "logprobs")["log_probs"] == [-1.0] * 3


def test_an_answer_interrupted_before_its_first_token() -> None:
    fields = to_token_output(completion(0, [], FinishReason.ABORT), 7, None)
    assert fields["stop_reason"] == "aborted" and fields["log_probs"] is None
    assert fields["extra_fields"]["global_steps"] == 7 and fields["extra_fields"]["version_spans"] == []


def test_the_parts_of_an_interrupted_answer_are_joined() -> None:
    parts = [
        completion(2, [VersionSpan(0, 2, 1)], FinishReason.ABORT),
        completion(0, [], FinishReason.ABORT),
        completion(3, [VersionSpan(0, 1, 1), VersionSpan(1, 3, 3)]),
    ]
    outputs = [SimpleNamespace(**to_token_output(part, 3, None)) for part in parts]
    joined = join_extra_fields(outputs)
    assert joined["version_spans"] == [(0, 3, 1), (3, 5, 3)]
    assert (joined["min_global_steps"], joined["max_global_steps"], joined["global_steps"]) == (1, 3, 3)
    assert joined["spec_num_draft_tokens"] == 24 and joined["spec_num_plain_steps"] == 3


# --- weights -----------------------------------------------------------------------------------------------------


def some_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"odd": (3,), "half": (5, 7), "large": (40, 40), "scalar": (), "full": (4, 4)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["half"], tensors["odd"] = tensors["half"].bfloat16(), tensors["odd"].half()
    return tensors


async def reused_buffers(weights: dict[str, Tensor]) -> AsyncIterator[tuple[str, Tensor]]:
    """Pairs whose tensor is overwritten as soon as the next is asked for, as verl's checkpoint engines do it."""
    for name, tensor in weights.items():
        lent = tensor.clone()
        yield name, lent
        lent.fill_(torch.nan)


class Gathered:
    """A stand-in for a DTensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def full_tensor(self) -> Tensor:
        return self.tensor


@pytest.mark.parametrize("bucket_bytes", [ALIGNMENT, 256, 1 << 20])
def test_weights_arrive_as_they_were_sent(bucket_bytes: int) -> None:
    weights, received, sizes = some_weights(), {}, []

    async def take(bucket: Bucket) -> None:
        sizes.append(len(bucket.data))
        received.update({name: tensor.clone() for name, tensor in bucket.tensors()})

    asyncio.run(send(reused_buffers(weights), take, bucket_bytes, torch.device("cpu")))
    assert list(received) == list(weights)
    assert all(
        torch.equal(received[name], tensor) and received[name].dtype == tensor.dtype
        for name, tensor in weights.items()
    )
    alone = {tensor.nbytes for tensor in weights.values() if tensor.nbytes > bucket_bytes}
    assert all(size <= bucket_bytes or size in alone for size in sizes)


def test_sharded_weights_are_gathered() -> None:
    received = {}

    async def shards() -> AsyncIterator[tuple[str, Any]]:
        for name, tensor in some_weights().items():
            yield name, Gathered(tensor)

    async def take(bucket: Bucket) -> None:
        received.update({name: tensor.clone() for name, tensor in bucket.tensors()})

    asyncio.run(send(shards(), take, 256, torch.device("cpu")))
    assert list(received) == list(some_weights())


class Engine:
    """Takes weights as an engine does."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.calls: list[tuple[int, dict[str, Tensor]]] = []

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        taken = {}
        for name, tensor in weights:
            if name == self.refuse:
                raise WeightError(f"{name}: not of this model")
            taken[name] = tensor.clone()
        self.calls.append((version, taken))
        return "report"


def test_an_update_is_one_stream() -> None:
    weights, engine = some_weights(), Engine()

    async def update() -> Any:
        stream = WeightStream(engine, 5)
        await send(reused_buffers(weights), stream.feed, 256, torch.device("cpu"))
        return await stream.finish()

    assert asyncio.run(update()) == "report"
    ((version, taken),) = engine.calls
    assert version == 5 and all(torch.equal(taken[name], tensor) for name, tensor in weights.items())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["odd", "full"])
def test_what_the_engine_refuses_reaches_the_sender(name: str) -> None:
    async def update() -> None:
        stream = WeightStream(Engine(refuse=name), 5)
        await send(reused_buffers(some_weights()), stream.feed, 256, torch.device("cpu"))
        await stream.finish()

    with pytest.raises(WeightError, match=f"{name}: not of this model"):
        asyncio.run(update())


@pytest.mark.timeout(20)
def test_a_sender_that_fails_ends_the_update() -> None:
    engine = Engine()

    async def update() -> None:
        stream = WeightStream(engine, 5)
        await stream.feed(Bucket([("a", torch.uint8, (2,), 0)], torch.zeros(2, dtype=torch.uint8).numpy()))
        await stream.cancel("lost")
        with pytest.raises(WeightError, match="sender of the weights failed: lost"):
            await stream.finish()

    asyncio.run(update())
    assert engine.calls == []
