"""The shipped policy's trajectories under coupled sampling do not depend on whether or how one speculates."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.drafters.history import History
from rollout_spec.kernels.decoder_layer import LayersInOneCall
from rollout_spec.kernels.library import kernels
from rollout_spec.models.decoder import Decoder
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off, RandomLengths
from rollout_spec.policy.cost_model import CostModel, PassCost

from .conftest import DRAFTER

ARITHMETIC = Path(__file__).parents[2] / "examples" / "arithmetic"
sys.path.insert(0, str(ARITHMETIC))  # problems.py

REQUESTS, SEEDS = 64, range(4)
LEAST_TOKENS = 50_000


class TogglingDraftLength(Fixed):
    """Speculation switched on and off at random, for the whole batch, between steps."""

    def __init__(self, draft_length, seed):
        super().__init__(draft_length)
        self.generator = torch.Generator().manual_seed(seed)

    def plan(self, state):
        on = torch.rand((), generator=self.generator).item() < 0.5
        return super().plan(state) if on else Off().plan(state)


MODES = {
    "on": lambda: Fixed(4),
    "toggled at random": lambda: TogglingDraftLength(4, seed=1),
    "K at random": lambda: RandomLengths(seed=2, longest=8, off=0.0),
    "history": lambda: Fixed(8, drafter="history"),
    "automatic": lambda: AutomaticPolicy(COSTS, probe_share=0.1, explore_share=0.1),
}


# Invented, so that the automatic policy switches often between plain, the self-drafter, history and both.
COSTS = CostModel(
    {"target": PassCost(2e-3, 0.0, 1e-3, 1e-5, 0.0), DRAFTER: PassCost(8e-4, 0.0, 3e-4, 1e-5, 0.0)}
)


def engine_for(dtype):
    engine = RolloutEngine.from_pretrained(
        ARITHMETIC / "policy",
        dtype=dtype,
        max_model_len=640,
        speculation={"drafter": DRAFTER, "draft_length": 4},
    )
    engine.backend.history = History()
    return engine


def rollouts(engine, policy, temperature, seeds):
    """Token ids of `REQUESTS` prompts for each seed, all in one batch."""
    from problems import prompts

    engine.backend.policy = policy
    texts = prompts(REQUESTS, seed=5, split="test")
    params = [
        SamplingParams(temperature=temperature, max_tokens=256, seed=seed) for seed in seeds for _ in texts
    ]
    ids = [f"{seed}/{row}" for seed in seeds for row in range(REQUESTS)]
    return [c.token_ids for c in engine.generate(texts * len(seeds), params, request_ids=ids)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identical_with_speculation_on_off_toggled_and_any_k(dtype):
    engine = engine_for(dtype)
    assert engine.stats().exactness == "E2"
    plain = rollouts(engine, Off(), 1.0, SEEDS)
    assert engine.stats().spec.drafted == 0
    compared = 0
    for name, make_policy in MODES.items():
        before = engine.stats().spec.accepted
        speculative = rollouts(engine, make_policy(), 1.0, SEEDS)
        different = [row for row, (a, b) in enumerate(zip(plain, speculative, strict=True)) if a != b]
        assert not different, f"{name}: {len(different)} of {len(plain)} trajectories differ"
        assert engine.stats().spec.accepted > before
        compared += sum(map(len, speculative))
    assert compared >= LEAST_TOKENS
    assert len({tuple(tokens) for tokens in plain}) > REQUESTS  # seeds give different samples


@pytest.mark.skipif(kernels() is None, reason="this machine has none of the CPU kernels")
def test_layers_in_one_call_change_no_bit(monkeypatch):
    """Of the target and of the drafter; without the call they run kernel by kernel."""
    calls = []
    run = LayersInOneCall.__call__
    monkeypatch.setattr(
        LayersInOneCall, "__call__", lambda *a: (calls.append((a[0]._layers, *a[1:])), run(*a))[1]
    )
    engine = engine_for("bfloat16")
    together = rollouts(engine, Fixed(4), 1.0, [0])
    weights = engine.backend.weights
    for model in (weights.target, weights.drafter.model):
        assert (model.weights.for_kernels, 0, model.spec.num_layers) in calls
    monkeypatch.setattr(LayersInOneCall, "__call__", lambda *_: pytest.fail("a layer in one call"))
    monkeypatch.setattr(Decoder, "_layers", lambda *a: partial(Decoder._one_by_one, *a))
    assert rollouts(engine, Fixed(4), 1.0, [0]) == together


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_is_identical_too(dtype):
    engine = engine_for(dtype)
    plain = rollouts(engine, Off(), 0.0, [0])
    for name, make_policy in MODES.items():
        assert rollouts(engine, make_policy(), 0.0, [0]) == plain, name


def test_a_shifted_noise_position_is_caught(monkeypatch):
    """The comparison can fail: draft with the noise of the neighbouring position, verify with it too."""
    from rollout_spec.torch_backend import backend

    engine = engine_for("float32")
    plain = rollouts(engine, Off(), 1.0, [0])
    row_keys = backend.row_keys

    def shifted(base, version, position):
        return row_keys(base, version, position + (position.shape[1] > 1))

    monkeypatch.setattr(backend, "row_keys", shifted)
    assert rollouts(engine, Fixed(4), 1.0, [0]) != plain


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.0)])
def test_logprobs_equal_a_plain_reforward(dtype, tolerance):
    """fp32 within 1e-5; bf16 bit for bit, which E2 promises."""
    engine = engine_for(dtype)
    from problems import prompts

    for completion in engine.generate(prompts(24, seed=6, split="test"), SamplingParams(max_tokens=200)):
        reforward = engine.logprobs(completion.prompt_token_ids + completion.token_ids)
        start = len(completion.prompt_token_ids) - 1
        worst = max(abs(a - b) for a, b in zip(completion.logprobs, reforward[start:], strict=True))
        assert worst <= tolerance
