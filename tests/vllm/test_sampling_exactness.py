"""Speculation inside vLLM samples what vLLM would have sampled without it, whatever the parameters."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from always_history import AlwaysHistory
from small_engines import (
    DRAFTER,
    POLICY,
    counts,
    generate,
    perturbed,
    policy_prompts,
    random_draft_lengths,
    recorded_drafts,
    runner,
    scheduler,
    start,
    stop_all,
    tiny_model,
)
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

from rollout_spec.integrations.vllm import compat, sampling
from rollout_spec.proofs.distribution import chi_square

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

REJECTION = {"verifier": "rejection"}
ALPHA = 1e-4
V = 32
PROMPT = [3, 7, 11, 3, 7, 11, 3, 7]
WIDTHS = {
    "T=1": {"temperature": 1.0},
    "T=0.8, cut": {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    "T=0.6": {"temperature": 0.6},
    "min_p": {"temperature": 0.9, "min_p": 0.08},
}


@pytest.fixture(scope="module", autouse=True)
def _engines():
    yield
    stop_all()


# --- vllm#55005 --------------------------------------------------------------------------------------------------


@pytest.fixture
def stock_expand():
    """vLLM's own kernel in force, until the test is over."""
    import vllm.utils.cpu_triton_utils as kernels
    from vllm.platforms import current_platform
    from vllm.triton_utils.dispatcher import register_kernels

    compat.install()  # as starting an engine does; vLLM's search for its kernels needs it (`deny_special_names`)
    current_platform.register_triton_kernel_overrides()
    spec = importlib.util.find_spec(kernels.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    before = kernels._expand_kernel_impl
    name = "vllm.v1.sample.rejection_sampler.expand_kernel"
    kernels._expand_kernel_impl = fresh._expand_kernel_impl
    register_kernels({name: fresh._expand_kernel_impl})
    yield
    kernels._expand_kernel_impl = before
    register_kernels({name: before})


def test_vllm_still_needs_the_workaround(stock_expand) -> None:
    """Where this fails, vllm#55005 is fixed in every supported release: delete `expand` and `fix_expand`."""
    assert sampling.probe_expand()


def test_the_workaround_spreads_values_over_rows(stock_expand) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    assert sampling.fix_expand()
    assert not sampling.probe_expand()
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        given = torch.tensor([0, 7, 3]).to(dtype)
        assert expand_batch_to_tokens(given, ends, 5, 0, 1).tolist() == [1, 1, 3, 3, 3]
        assert expand_batch_to_tokens(given, ends, 5).tolist() == [0, 0, 3, 3, 3]
    assert not sampling.fix_expand(), "a second time there is nothing to mend"
    current_platform.register_triton_kernel_overrides()  # another engine starts in this process
    assert not sampling.probe_expand()


def test_the_workaround_is_for_cpus_only(stock_expand, monkeypatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert not sampling.fix_expand()
    assert sampling.probe_expand()


# --- distribution ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", V)


@pytest.fixture(scope="module")
def distorted(tiny, tmp_path_factory):
    return perturbed(tiny, tmp_path_factory.mktemp("distorted") / "model", 0.12)


@pytest.fixture(scope="module")
def sampler_of(tiny, distorted):
    """`sampler_of("rejection")`: an engine that speculates over the tiny model with a drafter that is often wrong."""
    made: dict[str, Any] = {}

    def engine(verifier: str) -> Any:
        if verifier not in made:
            made[verifier] = start(
                tiny,
                drafts=2,
                drafter=distorted,
                plugin={"verifier": verifier},
                max_model_len=64,
                max_num_seqs=256,
                kv_cache_memory_bytes=64 << 20,
                seed=123,
            )
        return made[verifier]

    return engine


@pytest.fixture(scope="module")
def from_history(tiny):
    """An engine that drafts from what other samples of the prompt were, and from nothing else."""
    llm = start(
        tiny,
        drafts=2,
        plugin={},
        speculative={"quantization": f"rollout_spec_{DRAFTER}"},
        scheduler_cls="rollout_spec.integrations.vllm.scheduler.PolicyScheduler",
        max_model_len=64,
        max_num_seqs=256,
        kv_cache_memory_bytes=64 << 20,
        seed=321,
    )
    scheduler(llm).decisions.policy = AlwaysHistory(2)
    return llm


@pytest.fixture(scope="module")
def exact(tiny):
    """`exact(width)`: probabilities [V, V, V, V] of four tokens after PROMPT, by enumeration in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    prompt = torch.tensor(PROMPT)
    logits = []
    with torch.inference_mode():
        for length in range(4):
            beginnings = torch.tensor(list(product(range(V), repeat=length)), dtype=torch.int64)
            rows = torch.cat([prompt.expand(V**length, -1), beginnings], 1)
            logits.append(torch.cat([model(part).logits[:, -1] for part in rows.split(4096)]).double())
    made: dict[str, np.ndarray] = {}

    def joint(width: str) -> np.ndarray:
        if width not in made:
            probs = [processed(rows, **WIDTHS[width]).view((V,) * (i + 1)) for i, rows in enumerate(logits)]
            made[width] = (probs[0][:, None, None, None] * probs[1][:, :, None, None] * probs[2][..., None] * probs[3]).numpy()  # fmt: skip
        return made[width]

    return joint


def processed(
    logits: torch.Tensor, temperature: float, top_k: int = V, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Probabilities float64 [R, V], step by step."""
    logits = logits / temperature
    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = torch.zeros_like(probs).scatter(1, order, (probs.cumsum(-1) - probs < top_p).double())
    probs = logits.softmax(-1) * kept
    probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    return probs / probs.sum(-1, keepdim=True)


def seen(answers: Sequence[Sequence[int]]) -> np.ndarray:
    """How often each four tokens came, int64 [V, V, V, V]."""
    table = np.zeros((V,) * 4, dtype=np.int64)
    np.add.at(table, tuple(np.array(answers).T), 1)
    return table


def smallest_p(table: np.ndarray, probs: np.ndarray) -> float:
    """Of tests of single tokens and of pairs, corrected for their number.

    The first token is sampled by prefill; the second and third are verified, the fourth comes from the bonus row
    where both drafts were accepted.
    """
    kept = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3)]
    found = []
    for axes in kept:
        others = tuple(axis for axis in range(4) if axis not in axes)
        pvalue, freedom = chi_square(table.sum(others).ravel(), probs.sum(others).ravel())
        assert freedom > 3
        found.append(pvalue)
    return min(1.0, min(found) * len(found))


def draw(llm: Any, samples: int, **params: Any) -> list[list[int]]:
    given = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, **params)
    return generate(llm, [PROMPT] * samples, given)


@pytest.mark.parametrize("verifier", ["rejection", "coupled"])
@pytest.mark.parametrize("width", ["T=1", "T=0.8, cut"])
def test_samples_have_the_policys_distribution(sampler_of, exact, verifier: str, width: str) -> None:
    llm = sampler_of(verifier)
    before = counts(llm)
    table = seen(draw(llm, 20_000, **WIDTHS[width]))
    after = counts(llm)
    drafted, accepted = (after[name] - before[name] for name in ("drafted", "accepted"))
    assert 0.3 < accepted / drafted < 0.9, "a drafter that is never rejected hides a wrong verifier"
    assert smallest_p(table, exact(width)) > ALPHA


@pytest.mark.parametrize("width", ["T=1", "T=0.8, cut"])
def test_drafts_from_history_leave_the_distribution(from_history, exact, width: str) -> None:
    """A draft without a distribution is accepted with the target's probability of it, and else never comes again."""
    before = counts(from_history)
    table = seen(draw(from_history, 20_000, **WIDTHS[width]))
    drafted, accepted = (counts(from_history)[name] - before[name] for name in ("drafted", "accepted"))
    assert drafted > 10_000 and 0.05 < accepted / drafted < 0.9
    assert smallest_p(table, exact(width)) > ALPHA


def test_history_judged_by_another_distribution_is_noticed(from_history, exact, monkeypatch) -> None:
    """As if the drafter's probabilities of the step before were taken for history's: here, even ones."""

    def uniform(metadata: Any) -> torch.Tensor:
        return torch.full((len(metadata.draft_token_ids), V), 1 / V)

    monkeypatch.setattr(runner(from_history), "_get_spec_decode_draft_probs", uniform)
    assert smallest_p(seen(draw(from_history, 4000, temperature=1.0)), exact("T=1")) < 1e-8


def test_min_p_beside_speculating_requests_has_its_distribution(sampler_of, exact) -> None:
    llm = sampler_of("rejection")
    width = {
        name: SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, **WIDTHS[name])
        for name in WIDTHS
    }
    params = [width["min_p"], width["T=1"]] * 8000
    answers = generate(llm, [PROMPT] * len(params), params)
    assert smallest_p(seen(answers[::2]), exact("min_p")) > ALPHA
    assert smallest_p(seen(answers[1::2]), exact("T=1")) > ALPHA
    assert smallest_p(seen(answers[::2]), exact("T=1")) < 1e-8, (
        "the test would not notice if min_p were dropped"
    )


@pytest.mark.parametrize("verifier", ["rejection", "coupled"])
def test_accepting_every_draft_is_noticed(sampler_of, exact, verifier: str, monkeypatch) -> None:
    import vllm.v1.sample.rejection_sampler as module

    signature = inspect.signature(module.rejection_sample)

    def accept_all(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        drafts = given["draft_token_ids"].split(given["num_draft_tokens"])
        rows = torch.full((len(drafts), given["max_spec_len"] + 1), -1, dtype=torch.int32)
        for row, tokens, bonus in zip(rows, drafts, given["bonus_token_ids"]):
            row[: len(tokens)] = tokens
            row[len(tokens)] = bonus[0]
        return rows

    llm = sampler_of(verifier)
    monkeypatch.setattr(module, "rejection_sample", accept_all)
    assert smallest_p(seen(draw(llm, 4000, temperature=1.0)), exact("T=1")) < 1e-8


def test_without_the_workaround_samples_are_wrong(sampler_of, exact, request) -> None:
    """What vllm#55005 does to an engine; where this fails, it does no harm any more."""
    llm = sampler_of("rejection")
    draw(llm, 1)  # the first sample puts the workaround in
    request.getfixturevalue("stock_expand")
    assert smallest_p(seen(draw(llm, 4000, **WIDTHS["T=0.6"])), exact("T=0.6")) < 1e-8


# --- parameters that vLLM refuses beside speculation, or judges wrongly ------------------------------------------


@pytest.fixture(scope="module")
def prompts():
    return policy_prompts(60)


@pytest.fixture(scope="module")
def stock():
    """vLLM without speculation and without the plugin."""
    return start()


@pytest.fixture(scope="module")
def speculating(tmp_path_factory):
    drafter = perturbed(POLICY, tmp_path_factory.mktemp("distorted") / "policy", 0.12)
    return start(drafts=3, drafter=drafter, plugin=REJECTION)


KINDS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.2},
    {"logit_bias": {49: 3.0, 50: -4.0}},
    {"logit_bias": {3: 2.0}, "min_p": 0.1, "presence_penalty": 0.5},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.3},
    {"min_tokens": 40},
    {"allowed_token_ids": [3, *range(43, 62)]},
    {"bad": [[49], [50, 51]]},
]


def mixed(count: int) -> list[SamplingParams]:
    """Greedy requests of every kind, and sampled ones between them."""
    params = []
    for index in range(count):
        kind = dict(KINDS[index % len(KINDS)])
        bad = kind.pop("bad", None)
        one = SamplingParams(temperature=0.0, max_tokens=80, detokenize=False, **kind)
        one._bad_words_token_ids = bad
        params.append(one)
    params[5::10] = [SamplingParams(temperature=1.0, max_tokens=60, detokenize=False)] * len(params[5::10])
    return params


def greedy_answers(llm: Any, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    answers = generate(llm, prompts, params)
    return [answer for answer, one in zip(answers, params) if one.temperature == 0]


def test_every_parameter_means_what_it_means_without_speculation(stock, speculating, prompts) -> None:
    params = mixed(len(prompts))
    wanted = greedy_answers(stock, prompts, params)
    before = counts(speculating)["accepted"]
    with recorded_drafts(speculating) as drafted:
        assert greedy_answers(speculating, prompts, params) == wanted
    first = min(map(int, drafted))
    ids = {str(first + index) for index in range(len(prompts))}
    unable = {str(first + i) for i, one in enumerate(params) if one.min_p > 0 or one.logit_bias}
    assert set(drafted) == ids - unable, "the others go on speculating, in the same batches"
    assert counts(speculating)["accepted"] > before
    with random_draft_lengths(speculating, (0, 1, 2, 3)):
        assert greedy_answers(speculating, prompts, params) == wanted


def lengths_without_limit(llm: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy answers, and parameters whose min_tokens ask for just what comes anyway."""
    free = SamplingParams(temperature=0.0, max_tokens=100, detokenize=False)
    answers = generate(llm, prompts, free)
    params = []
    for answer in answers:
        one = free.clone()
        one.min_tokens = len(answer) - 1
        params.append(one)
    return answers, params


def test_min_tokens_ends_where_it_should(stock, prompts, monkeypatch) -> None:
    """vLLM bars end tokens from the bonus row by the length before the drafts; drafts end before they would matter."""
    wanted, params = lengths_without_limit(stock, prompts)
    llm = start(drafts=3, plugin=REJECTION)
    assert generate(llm, prompts, params) == wanted
    found = counts(llm)
    assert found["drafted"] > 300, "drafts are shortened, not given up"
    monkeypatch.setattr(sampling.DraftLimits, "apply", lambda self, running: None)
    assert generate(llm, prompts, params) != wanted, (
        "vLLM judges the bonus row rightly now: delete this limit"
    )


def test_vllm_still_refuses_what_we_admit(prompts) -> None:
    """Where this fails, vLLM supports the parameter beside speculation: stop limiting it."""
    llm = start(drafts=2)
    for refused in ({"min_p": 0.1}, {"logit_bias": {5: 1.0}}):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
            generate(llm, prompts[:1], SamplingParams(detokenize=False, **refused))
    with pytest.raises(ValueError, match="not supported when speculative decoding"):
        start(drafts=2, logits_processors=[NoSevens])


class NoSevens(LogitsProcessor):
    """A custom processor that acts on every request: never a 7."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, 55] = -torch.inf
        return logits


def test_custom_processors_are_applied_and_nothing_is_drafted(prompts) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, detokenize=False)
    wanted = generate(start(logits_processors=[NoSevens]), prompts[:16], params)
    assert not any(55 in answer for answer in wanted)
    llm = start(drafts=2, plugin=REJECTION, logits_processors=[NoSevens])
    with recorded_drafts(llm) as drafted:
        assert generate(llm, prompts[:16], params) == wanted
    assert drafted == {}


def test_drafts_that_would_be_misjudged_stop_the_engine(speculating, prompts, monkeypatch) -> None:
    """A scheduler that does not come from vLLM's own would let them through."""
    monkeypatch.setattr(sampling.DraftLimits, "apply", lambda self, running: None)
    given = [runner(speculating)]
    with pytest.raises(RuntimeError, match="scheduler_cls derived from"):
        generate(speculating, prompts[:4], SamplingParams(min_p=0.1, detokenize=False, max_tokens=20))
    assert given
