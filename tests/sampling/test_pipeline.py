from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec.contracts import InvalidRequest, SamplingParams
from rollout_spec.sampling import reference
from rollout_spec.sampling.pipeline import token_logprobs, top_logprobs
from rollout_spec.sampling.table import SamplingTable

V, TRUE_V = 128, 100
PROMPT, OUTPUT, END = [1, 2, 3, 3], [5, 2, 5], [7, 9]


def make_logits(rows: int = 1, batch: int = 1, seed: int = 0, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(batch, rows, V, generator=torch.Generator().manual_seed(seed)) * 3
    logits[..., TRUE_V:] = -math.inf
    return logits.bfloat16().float() if ties else logits


def make_batch(*requests: SamplingParams, prompt=PROMPT, output=OUTPUT, end=END):
    table = SamplingTable(len(requests), V, "cpu", TRUE_V)
    for slot, params in enumerate(requests):
        table.assign(slot, params, prompt, output, end, key=slot)
    return table.select(torch.arange(len(requests)), range(len(requests)))


def process(params: SamplingParams, logits: torch.Tensor, **kwargs) -> torch.Tensor:
    return make_batch(params, **kwargs).process(logits).logits


CUTS = {
    "temperature": (0.7, lambda x: hf.TemperatureLogitsWarper(x)),
    "top_k": (12, lambda x: hf.TopKLogitsWarper(x)),
    "top_p": (0.83, lambda x: hf.TopPLogitsWarper(x)),
    "min_p": (0.04, lambda x: hf.MinPLogitsWarper(x)),
}
WARPERS = {"repetition_penalty": (1.3, lambda x: hf.RepetitionPenaltyLogitsProcessor(x)), **CUTS}
COMBINATIONS = [*((name,) for name in WARPERS), ("top_k", "top_p"), tuple(CUTS), tuple(WARPERS)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_equals_transformers(names, ties):
    params = SamplingParams(**{name: WARPERS[name][0] for name in names})
    processors = [WARPERS[name][1](WARPERS[name][0]) for name in names]
    for seed in range(20):
        logits = make_logits(seed=seed, ties=ties)
        expected = logits[0]
        for processor in processors:
            expected = processor(torch.tensor([PROMPT + OUTPUT]), expected)
        assert torch.equal(process(params, logits)[0], expected), seed


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.999999])
def test_top_p_extremes_equal_transformers(top_p):
    for seed in range(10):
        logits = make_logits(seed=seed, ties=True)
        assert torch.equal(
            process(SamplingParams(top_p=top_p), logits)[0], hf.TopPLogitsWarper(top_p)(None, logits[0])
        )


def test_presence_frequency_bias_and_min_tokens_by_hand():
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=-0.25, logit_bias={5: 2.0, 11: -100.0}, min_tokens=5
    )
    logits = make_logits(rows=3)
    block = torch.tensor([[5, 8, 2]])
    got = make_batch(params).process(logits, block).logits[0]
    for row, seen in enumerate(([5, 2, 5], [5, 2, 5, 5], [5, 2, 5, 5, 8])):
        expected = logits[0, row].clone()
        for token in set(seen):
            expected[token] -= 0.5 - 0.25 * seen.count(token)
        expected[5] += 2
        expected[11] -= 100
        if len(seen) < 5:
            expected[END] = -math.inf
        torch.testing.assert_close(got[row], expected)


request = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, -1, 1, 7, 60, 10**6]),
    top_p=st.sampled_from([1.0, 0.13, 0.61, 0.9871]),
    min_p=st.sampled_from([0.0, 0.013, 0.37, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.77, 1.21]),
    presence_penalty=st.sampled_from([0.0, 1.31, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.53, -1.9]),
    logit_bias=st.none()
    | st.dictionaries(st.integers(0, TRUE_V - 1), st.floats(-100, 100, width=32), max_size=5),
    min_tokens=st.integers(0, 8),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    requests=st.lists(request, min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    block=st.lists(st.integers(0, TRUE_V - 1), max_size=4),
)
def test_equals_reference(requests, seed, ties, block):
    """Mixed batches, with draft tokens, step by step (drafting) and all at once (verification)."""
    logits = make_logits(len(block) + 1, len(requests), seed, ties)
    blocks = torch.tensor([block] * len(requests), dtype=torch.int64).view(len(requests), -1)
    before = logits.clone()
    batch = make_batch(*requests)
    verified = batch.process(logits, blocks)
    for row in range(len(block) + 1):
        drafted = batch.process(logits[:, row : row + 1], blocks[:, :row], first=row)
        assert torch.equal(drafted.logits[:, 0], verified.logits[:, row])
        for b, params in enumerate(requests):
            expected, uncut = reference.process(
                logits[b, row].numpy(), params, PROMPT, OUTPUT + block[:row], END
            )
            np.testing.assert_allclose(verified.logits[b, row].numpy(), expected, rtol=1e-5, atol=1e-5)
            assert verified.logits[b, row].max() > -math.inf
            if verified.uncut is not None:
                np.testing.assert_allclose(verified.uncut[b, row].numpy(), uncut, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


def test_nothing_in_use_returns_the_input_itself():
    logits = make_logits(rows=2)
    processed = make_batch(SamplingParams(top_k=-1, min_p=0.0, min_tokens=0)).process(logits)
    assert processed.logits is logits
    assert processed.uncut is None


def test_a_sequence_does_not_depend_on_the_batch():
    requests = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.7, repetition_penalty=1.4, logit_bias={3: 1.0}),
        SamplingParams(top_k=5, min_p=0.1, min_tokens=9, temperature=1.5),
    ]
    logits = make_logits(rows=3, batch=4, ties=True)
    together = make_batch(*requests).process(logits).logits
    for b, params in enumerate(requests):
        assert torch.equal(process(params, logits[b : b + 1])[0], together[b])


def test_greedy_is_a_point_at_the_first_largest():
    logits = torch.full((1, 1, V), -math.inf)
    logits[0, 0, :50] = torch.tensor([0.0, 2.0] * 25)
    processed = make_batch(SamplingParams(temperature=0, top_k=3, top_p=0.1)).process(logits)
    assert processed.logits[0, 0].argmax() == 1
    assert (processed.logits[0, 0] > -math.inf).sum() == 1
    got = token_logprobs(logits, processed, torch.tensor([[1]]))
    assert got.processed_logprob.item() == 0
    assert got.mask_mass.item() == 1
    assert got.logprob.item() == pytest.approx(logits[0, 0].log_softmax(0)[1].item())


def test_no_row_ends_without_a_token():
    everything = SamplingParams(logit_bias=dict.fromkeys(range(TRUE_V), -100.0), min_p=1.0)
    assert process(everything, make_logits()).max() > -math.inf
    one_left = torch.full((1, 1, V), -math.inf)
    one_left[..., END[0]] = 1.0
    assert torch.equal(process(SamplingParams(min_tokens=9), one_left), one_left)


def test_end_tokens_are_masked_until_min_tokens():
    table = SamplingTable(1, V, "cpu", TRUE_V)
    table.assign(0, SamplingParams(min_tokens=3), PROMPT, [4], END, key=0)
    slots, logits = torch.tensor([0]), make_logits()
    assert (table.select(slots, [0]).process(logits).logits[..., END] == -math.inf).all()
    table.record(slots, torch.tensor([[4, 4, 9]]), torch.tensor([2]))
    assert torch.equal(table.select(slots, [0]).process(logits).logits, logits)


def test_recorded_tokens_count_as_output_and_ignored_ones_do_not():
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2)
    table = SamplingTable(2, V, "cpu", TRUE_V)
    for slot in range(2):
        table.assign(slot, params, PROMPT, OUTPUT, END, key=0)
    table.record(torch.tensor([1, 0]), torch.tensor([[4, 5, 6], [8, 8, -1]]), torch.tensor([1, 2]))
    logits = make_logits(batch=2)
    got = table.select(torch.arange(2), [0, 1]).process(logits).logits
    for slot, extra in ((0, [8, 8]), (1, [4])):
        alone = process(params, logits[slot : slot + 1], output=OUTPUT + extra)
        assert torch.equal(got[slot], alone[0])


def test_a_reused_slot_forgets_its_last_request():
    used = SamplingParams(
        logit_bias={4: 3.0, 5: 1.0, 6: 1.0},
        presence_penalty=1.0,
        repetition_penalty=2.0,
        min_tokens=50,
        top_k=2,
    )
    table = SamplingTable(2, V, "cpu", TRUE_V)
    logits = make_logits(batch=2)
    table.assign(0, used, PROMPT, OUTPUT, END, key=0)
    table.release(0)
    table.assign(0, SamplingParams(), PROMPT, [], END, key=0)
    table.assign(1, used, [70], [71], [80, 81, 82], key=0)
    got = table.select(torch.arange(2), [0, 1]).process(logits).logits
    assert torch.equal(got[0], logits[0])
    table.release(0)
    table.assign(0, SamplingParams(presence_penalty=1.0), [60], [61], END, key=0)
    got = table.select(torch.arange(2), [0, 1]).process(logits).logits
    assert torch.equal(got[0], process(SamplingParams(presence_penalty=1.0), logits[:1], output=[61])[0])
    assert torch.equal(got[1], process(used, logits[1:], prompt=[70], output=[71], end=[80, 81, 82])[0])


def test_growing_lists_of_end_tokens_and_biases_keep_the_others():
    small = SamplingParams(min_tokens=9, logit_bias={1: 1.0})
    large = SamplingParams(min_tokens=9, logit_bias=dict.fromkeys(range(20), 2.0))
    table = SamplingTable(2, V, "cpu", TRUE_V)
    table.assign(0, small, [], [], [9], key=0)
    table.assign(1, large, [], [], [10, 11, 12, 13, 14], key=0)
    logits = make_logits(batch=2)
    got = table.select(torch.arange(2), [0, 1]).process(logits).logits
    assert torch.equal(got[0], process(small, logits[:1], prompt=[], output=[], end=[9])[0])
    assert torch.equal(got[1], process(large, logits[1:], prompt=[], output=[], end=[10, 11, 12, 13, 14])[0])
    assert got[0, 0, 0] == logits[0, 0, 0]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(logit_bias={TRUE_V: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=(3, TRUE_V)), "stop_token_ids"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(params, field):
    with pytest.raises(InvalidRequest, match=f"{field}=100: the vocabulary has 100 tokens"):
        make_batch(params)


def test_penalty_state_exists_only_when_a_request_needs_it():
    table = SamplingTable(2, V, "cpu", TRUE_V)
    table.assign(0, SamplingParams(top_k=5, logit_bias={3: 1.0}), PROMPT, [], END, key=0)
    assert table._counts is None
    table.assign(1, SamplingParams(presence_penalty=0.1), PROMPT, [], END, key=0)
    assert table._counts is not None
    assert not table.select(torch.tensor([0]), [0]).stages.penalties


def test_token_logprobs_against_softmax():
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.2)
    logits = make_logits(rows=2)
    processed = make_batch(params).process(logits)
    tokens = processed.logits.argmax(-1)
    got = token_logprobs(logits, processed, tokens)
    _, uncut = reference.process(logits[0, 0].numpy(), params, PROMPT, OUTPUT, END)
    kept = processed.logits[0, 0].isfinite().numpy()
    assert got.mask_mass[0, 0].item() == pytest.approx(reference.softmax(uncut)[kept].sum(), rel=1e-5)
    for raw, value in ((logits, got.logprob), (processed.logits, got.processed_logprob)):
        expected = raw.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_all_logits_share_costs_a_logprob_no_precision():
    logits = make_logits(rows=2)
    high = logits + 2.0**12  # float32 steps of 2**-11 there, half of one by rounding the sum
    expected = high.double().log_softmax(-1)
    tokens, (values, ids) = high.argmax(-1), top_logprobs(high, 4)
    got = token_logprobs(high, make_batch(SamplingParams()).process(high), tokens)
    torch.testing.assert_close(values.double(), expected.gather(-1, ids), rtol=1e-6, atol=1e-6)
    assert torch.equal(got.logprob, values[..., 0])


def test_untouched_rows_report_one_logprob_and_full_mass():
    logits, tokens = make_logits(rows=2), torch.tensor([[3, 4]])
    got = token_logprobs(logits, make_batch(SamplingParams()).process(logits), tokens)
    assert torch.equal(got.logprob, got.processed_logprob)
    assert (got.mask_mass == 1).all()
    mixed = make_logits(rows=2, batch=2)
    processed = make_batch(SamplingParams(), SamplingParams(top_k=2)).process(mixed)
    got = token_logprobs(mixed, processed, processed.logits.argmax(-1))
    assert torch.equal(got.logprob[0], got.processed_logprob[0])
    assert (got.mask_mass[0] == 1).all()
    assert (got.mask_mass[1] < 1).all()


def test_top_logprobs():
    logits = make_logits(rows=2)
    values, ids = top_logprobs(logits, 4)
    expected = logits.log_softmax(-1).topk(4)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(ids, expected.indices)
