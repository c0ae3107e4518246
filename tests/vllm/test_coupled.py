"""Coupled verification in vLLM: what is emitted follows from keys, positions and the target's logits alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from small_engines import (
    DRAFTER,
    POLICY,
    counts,
    generate,
    perturbed,
    policy_prompts,
    random_draft_lengths,
    runner,
    scheduler,
    start,
    stop_all,
)
from torch import Tensor
from vllm import SamplingParams

from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.vllm import sampling
from rollout_spec.integrations.vllm.coupled import EXTRA_ARG, Noise, NoiseSource, choose, verify
from rollout_spec.requests import noise_key
from rollout_spec.sampling.noise import fold, row_keys
from rollout_spec.sampling.verify import coupled_scores

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

COUPLED = {"verifier": "coupled"}
NEAR = 1e-4  # a perturbed-score gap that float32 logits of two passes may bridge
WIDTHS = {"T=1": {"temperature": 1.0}, "T=0.8, cut": {"temperature": 0.8, "top_k": 20, "top_p": 0.9}}
RATE = 1e-5  # of near-ties per token
COUNT = 96


@pytest.fixture(scope="module", autouse=True)
def _engines():
    yield
    stop_all()


@pytest.fixture(scope="module")
def prompts():
    return policy_prompts(COUNT)


@pytest.fixture(scope="module")
def plain():
    return start(plugin=COUPLED)


@pytest.fixture(scope="module")
def speculating(tmp_path_factory):
    """Drafts with a distorted copy, so that many drafts are rejected."""
    drafter = perturbed(POLICY, tmp_path_factory.mktemp("distorted") / "policy", 0.12)
    return start(plugin=COUPLED, drafts=5, drafter=drafter)


@pytest.fixture(scope="module")
def reference():
    """The policy in transformers: logits [T, V] after each token of a sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0].float()

    return logits


def keyed(key: int, **params: Any) -> SamplingParams:
    return SamplingParams(
        **({"max_tokens": 120, "detokenize": False, "extra_args": {EXTRA_ARG: key}} | params)
    )


def batch(**params: Any) -> list[SamplingParams]:
    return [keyed(fold(17, index), **params) for index in range(COUNT)]


@dataclass
class Comparison:
    """Runs of the same samples: tokens compared, and how narrowly each first difference was decided."""

    tokens: int
    gaps: list[float]

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.tokens + other.tokens, self.gaps + other.gaps)

    def check(self) -> None:
        assert all(gap < NEAR for gap in self.gaps), f"tokens differ that are no near-ties: gaps {self.gaps}"
        assert len(self.gaps) <= RATE * self.tokens, f"{len(self.gaps)} near-ties in {self.tokens} tokens"


def compare(reference, prompts, params, left: list[list[int]], right: list[list[int]]) -> Comparison:
    """Score the first token in which two completions of a prompt part, in a plain pass of another implementation."""
    gaps, tokens = [], 0
    for prompt, sampling_params, a, b in zip(prompts, params, left, right, strict=True):
        if a == b:
            tokens += len(a)
            continue
        place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if place is None:
            gaps.append(float("inf"))  # one goes on where the other ends
            continue
        scores = perturbed_scores(reference, prompt + a[:place], sampling_params)[-1]
        gaps.append(float((scores[a[place]] - scores[b[place]]).abs()))
        tokens += place + 1
    return Comparison(tokens, gaps)


def perturbed_scores(reference, tokens: list[int], params: SamplingParams) -> Tensor:
    """Scores [T, V] whose largest is the token to emit after each of `tokens [T]`."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits = reference(tokens) / params.temperature
    count, vocab_size = logits.shape
    top_k = None if params.top_k <= 0 else torch.full((count,), min(params.top_k, vocab_size))
    top_p = None if params.top_p == 1 else torch.full((count,), params.top_p)
    logits = apply_top_k_top_p(logits, top_k, top_p)
    base = torch.tensor([params.extra_args[EXTRA_ARG]])
    keys = row_keys(base, 0, torch.arange(1, count + 1).unsqueeze(0)).squeeze(0)
    return coupled_scores(torch.nn.functional.pad(logits, (0, -vocab_size % 64), value=-torch.inf), keys)


@pytest.mark.timeout(900)
def test_trajectories_do_not_depend_on_speculation(prompts, plain, speculating, reference) -> None:
    """Off, on, toggled, and in another order: over so many tokens that one near-tie would be within the rate."""
    found, prompts = Comparison(0, []), prompts[:64]
    for width in WIDTHS.values():
        params = batch(**width, max_tokens=200, ignore_eos=True)[:64]
        off = generate(plain, prompts, params)
        before = counts(speculating)
        others = [generate(speculating, prompts, params)]
        after = counts(speculating)
        for seed in (0, 1):
            with random_draft_lengths(speculating, (0, 0, 1, 2, 5), seed):
                others.append(generate(speculating, prompts, params))
        others.append(generate(speculating, prompts[::-1], params[::-1])[::-1])

        drafted, accepted = (after[name] - before[name] for name in ("drafted", "accepted"))
        assert 0.2 < accepted / drafted < 0.97, "drafts must be accepted and rejected, or nothing is tested"
        for other in others:
            found += compare(reference, prompts, params, off, other)
    found.check()
    assert found.tokens >= 1 / RATE


@pytest.mark.parametrize("width", WIDTHS)
def test_every_token_wins_the_race_of_its_key(prompts, speculating, reference, width: str) -> None:
    params = batch(**WIDTHS[width])[:24]
    for prompt, sampling_params, answer in zip(prompts, params, generate(speculating, prompts[:24], params)):
        scores = perturbed_scores(reference, prompt + answer[:-1], sampling_params)[len(prompt) - 1 :]
        emitted = scores.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert (scores.amax(1) - emitted).max() < NEAR


def test_penalties_and_other_parameters_are_part_of_the_race(prompts, plain, speculating, reference) -> None:
    """Greedy, penalised, biased, barred and seeded requests in one batch."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.2},
        {"temperature": 0.9, "repetition_penalty": 1.2, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "logit_bias": {49: 1.5, 50: -2.0}},
        {"temperature": 1.0, "min_tokens": 30},
        {"temperature": 1.0, "bad_words_token_ids": None},
        {"temperature": 1.0, "allowed_token_ids": [3, *range(43, 62)]},
        {"temperature": 1.3, "top_k": 5, "seed": 5, "extra_args": None},
    ]
    kinds[6].pop("bad_words_token_ids")
    params = [keyed(fold(19, index), **kinds[index % len(kinds)]) for index in range(len(prompts))]
    for one in params[6 :: len(kinds)]:
        one._bad_words_token_ids = [[49], [50, 51]]
    off = generate(plain, prompts, params)
    on = generate(speculating, prompts, params)
    with random_draft_lengths(speculating, (0, 1, 5), seed=1):
        toggled = generate(speculating, prompts, params)
    assert sum(a != b for a, b in zip(off, on)) <= 1
    assert sum(a != b for a, b in zip(off, toggled)) <= 1


def test_the_self_drafter_under_a_policy_changes_nothing(prompts, plain, reference) -> None:
    """The quantized copy on the target's own cache, K decided in every step, long prompts in chunks, cached prefixes,
    and too few blocks for all, so that requests are preempted and computed again."""
    llm = start(
        plugin=COUPLED,
        drafts=5,
        speculative={"quantization": f"rollout_spec_{DRAFTER}"},
        scheduler_cls="rollout_spec.integrations.vllm.scheduler.PolicyScheduler",
        worker_extension_cls="rollout_spec.integrations.vllm.worker.WorkerExtension",
        enable_prefix_caching=True,
        max_num_batched_tokens=96,
        max_num_seqs=32,
        block_size=32,
        kv_cache_memory_bytes=6 << 20,
    )
    preempted = []
    it = scheduler(llm)

    def preempt(*args: Any, **kwargs: Any) -> None:
        preempted.append(1)
        type(it)._preempt_request(it, *args, **kwargs)

    it._preempt_request = preempt
    found = Comparison(0, [])
    for width in WIDTHS.values():
        params = batch(**width)
        off = generate(plain, prompts, params)
        for _ in range(2):
            found += compare(reference, prompts, params, off, generate(llm, prompts, params))
    assert not found.gaps and found.tokens > 5000
    assert preempted
    assert counts(llm)["accepted"] > 100


def test_the_checker_sees_a_shifted_key(prompts, plain, speculating, reference, monkeypatch) -> None:
    params = batch(temperature=1.0)
    off = generate(plain, prompts, params)
    keys = Noise.keys
    monkeypatch.setattr(
        Noise,
        "keys",
        lambda self, position, requests=None: keys(self, position + (requests is not None), requests),
    )
    on = generate(speculating, prompts, params)
    found = compare(reference, prompts, params, off, on)
    with pytest.raises(AssertionError, match="no near-ties"):
        found.check()


def test_the_checker_sees_a_plain_pass_with_other_noise(prompts, plain, reference, monkeypatch) -> None:
    params = batch(temperature=1.0)[:32]
    off = generate(plain, prompts[:32], params)
    source = runner(plain)._rollout_spec_noise
    monkeypatch.setattr(source, "_keys", {})
    monkeypatch.setattr(source, "key_of", lambda request_id, params: 1)
    other = generate(plain, prompts[:32], params)
    with pytest.raises(AssertionError, match="no near-ties"):
        compare(reference, prompts[:32], params, off, other).check()


def test_a_copy_of_the_target_drafts_what_it_will_choose(prompts) -> None:
    llm = start(plugin=COUPLED, drafts=4)
    for params in WIDTHS.values():
        generate(llm, prompts[:24], batch(**params)[:24])
    found = counts(llm)
    assert found["drafted"] > 500
    assert found["accepted"] > 0.99 * found["drafted"]


def test_samples_of_one_prompt_differ_and_repeat(prompts, plain) -> None:
    free = SamplingParams(temperature=1.0, max_tokens=24, detokenize=False, ignore_eos=True, n=3)
    given = [{"prompt_token_ids": prompts[0]}] * 2
    siblings = [
        tuple(sample.token_ids)
        for output in plain.generate(given, free, use_tqdm=False)
        for sample in output.outputs
    ]
    assert len(set(siblings)) == len(siblings), "siblings and equal prompts meet different noise"

    seeded = SamplingParams(temperature=1.0, max_tokens=24, detokenize=False, ignore_eos=True, seed=11)
    assert len({tuple(tokens) for tokens in generate(plain, [prompts[0]] * 3, seeded)}) == 1

    free = SamplingParams(temperature=1.0, max_tokens=24, detokenize=False, ignore_eos=True)
    first = generate(start(plugin=COUPLED), prompts[:4], free)
    assert generate(start(plugin=COUPLED), prompts[:4], free) == first, "request ids 0, 1, … name the samples"


def test_a_policy_version_has_noise_of_its_own(prompts, plain, monkeypatch) -> None:
    params = batch(temperature=1.0, ignore_eos=True, max_tokens=24)[:4]
    before = generate(plain, prompts[:4], params)
    monkeypatch.setattr(runner(plain), "rollout_spec_policy", SimpleNamespace(version=3), raising=False)
    after = generate(plain, prompts[:4], params)
    assert all(a != b for a, b in zip(before, after))


def test_vllm_itself_still_ties_tokens_to_speculation(prompts) -> None:
    """Where this fails, vLLM's own seeded sampling no longer depends on speculation; look whether it can be used."""
    params = [SamplingParams(temperature=1.0, max_tokens=32, detokenize=False, seed=i) for i in range(16)]
    plain = generate(start(), prompts[:16], params)
    assert generate(start(drafts=3), prompts[:16], params) != plain


def test_an_impossible_noise_key_is_refused(prompts, plain) -> None:
    with pytest.raises(InvalidRequest, match=EXTRA_ARG):
        NoiseSource(0).key_of("0-00000000", SimpleNamespace(extra_args={EXTRA_ARG: 2**63}, seed=None))


def test_keys_ignore_the_random_suffix_of_request_ids() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    request = SimpleNamespace(request_id="a-1", external_req_id=None)
    InputProcessor.assign_request_id(request)
    assert request.request_id != "a-1"
    nothing = SimpleNamespace(extra_args=None, seed=None)
    assert NoiseSource(5).key_of(request.request_id, nothing) == noise_key(5, "a-1", None, 0)
    assert NoiseSource(5).key_of(f"2_{request.request_id}", nothing) == noise_key(5, "2_a-1", None, 0)
    assert NoiseSource(5).key_of("x", SimpleNamespace(extra_args=None, seed=9)) == fold(9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": SimpleNamespace(rejection_sample_method="block")}, "standard"),
        ({"model_config": SimpleNamespace(use_fp64_gumbel=True)}, "use_fp64_gumbel"),
    ],
)
def test_what_cannot_be_coupled_is_refused(change, message: str) -> None:
    config = {
        "additional_config": {"rollout_spec": COUPLED},
        "use_v2_model_runner": False,
        "speculative_config": None,
        "model_config": SimpleNamespace(use_fp64_gumbel=False),
    }
    assert sampling.is_coupled(SimpleNamespace(**config))
    with pytest.raises(InvalidRequest, match=message):
        sampling.is_coupled(SimpleNamespace(**(config | change)))


def test_verify_is_the_loop_it_stands_for() -> None:
    """Ragged drafts, padded drafts (-1), greedy requests and requests without drafts."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 0, 2, 4, 0, 1])
    total, vocab_size = int(lengths.sum()), 50
    logits = torch.randn(total, vocab_size, generator=generator)
    temperature = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    position = torch.tensor([7, 1, 3, 9, 4, 2])
    base = torch.randint(2**62, (6,), generator=generator)
    bonus = torch.randint(vocab_size, (6, 1), generator=generator)
    noise = Noise(base, 2, position, lengths)

    wanted, drafts, row = [], [], 0
    for request, length in enumerate(lengths.tolist()):
        emitted, rejected = [], False
        for place in range(length):
            key = row_keys(base[request : request + 1], 2, position[request : request + 1, None] + place)[
                :, 0
            ]
            best = (
                logits[row].argmax() if temperature[request] == 0 else choose(logits[row : row + 1], key)[0]
            )
            wrong = (row + request) % 3 == 2
            drafts.append((-1 if row % 2 else (int(best) + 1) % vocab_size) if wrong else int(best))
            if not rejected:
                emitted.append(int(best))
                rejected = wrong
            row += 1
        if not rejected:
            emitted.append(int(bonus[request]))
        wanted.append(emitted + [-1] * (5 - len(emitted)))
    found = verify(noise, torch.tensor(drafts, dtype=torch.int32), logits, bonus.int(), temperature, 5)
    assert found.tolist() == wanted
    assert found.dtype == torch.int32
    assert noise.emitted.tolist() == [sum(token >= 0 for token in row) for row in wanted]
    next_ = noise.draft_keys(1)
    assert torch.equal(next_, row_keys(base, 2, (position + noise.emitted)[:, None])[:, 0])
    assert torch.equal(noise.draft_keys(1), row_keys(base, 2, (position + noise.emitted + 1)[:, None])[:, 0])
