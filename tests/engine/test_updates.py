"""The drafter follows the policy, or is set aside with one clear report; the output never depends on it."""

import logging
from dataclasses import replace

import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.contracts import VersionSpan, WeightError
from rollout_spec.torch_backend.completions import to_completion

from .conftest import DRAFTER, KINDS, VOCAB, make_model

PARAMS = SamplingParams(n=4, max_tokens=48, ignore_eos=True)
IDS = list("abcdef")


def tokens(completions):
    return [completion.token_ids for completion in completions]


def generate(engine, prompts):
    return tokens(engine.generate(prompts, PARAMS, request_ids=IDS))


def optimize(model, steps=3, seed=0):
    """A few real optimizer steps towards counting upwards in steps of `seed + 1`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        start = torch.randint(0, VOCAB, (8, 1), generator=generator)
        ids = (start + (seed + 1) * torch.arange(24)) % VOCAB
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_five_updates_equal_five_fresh_engines(make_engine, prompts, kind, dtype):
    model = make_model()
    engine = make_engine(model, speculation=kind, dtype=dtype)
    before = generate(engine, prompts)
    for version in range(1, 6):
        optimize(model, seed=version)
        report = engine.update_weights(model.named_parameters())
        assert report.version == version and report.seconds >= report.quantize_seconds > 0
        assert report.tensors == len(list(model.parameters())) and report.nbytes > 0
        fresh = make_engine(model, speculation=kind, dtype=dtype, version=version)
        after = generate(engine, prompts)
        assert after == generate(fresh, prompts)
        assert after != before
        before = after
        mine, theirs = (e.backend.weights.drafter for e in (engine, fresh))
        assert mine.version == theirs.version == version
        assert mine.linears.keys() == theirs.linears.keys() and "lm_head" in mine.linears
        for slot, linear in mine.linears.items():
            for name, tensor in linear.tensors().items():
                assert torch.equal(tensor, theirs.linears[slot].tensors()[name]), (slot, name)
        stats = engine.stats()
        assert stats.version == version and stats.drafter == kind and not stats.reports
        assert 0.3 < stats.canary_acceptance <= 1


def test_accepted_counts_equal_a_fresh_engines(make_engine, prompts):
    model = make_model()
    engine = make_engine(model)
    for version in range(1, 6):
        optimize(model, seed=version)
        engine.update_weights(model.named_parameters(), version)
        fresh = make_engine(model, version=version)
        mine, theirs = (e.generate(prompts, PARAMS, request_ids=IDS) for e in (engine, fresh))
        assert [c.spec for c in mine] == [c.spec for c in theirs]
        assert sum(c.spec.accepted for c in mine) > 0


def test_requests_in_flight_go_on_under_the_new_policy(make_engine, prompts):
    """Every token's logprob is the one of the policy its span names."""
    old, new = make_model(0), make_model(1)
    engine = make_engine(old)
    with engine._changed:
        groups = engine._submit(*engine._reader.read(prompts, PARAMS, None, None, IDS))
        for _ in range(12):
            engine.backend.step()
    engine.update_weights(new.named_parameters(), version=7)
    samples = [sample for group in groups for sample in group]
    while any(sample.finish_reason is None for sample in samples):
        engine._advance()
    mixed = 0
    for completion in (to_completion(s, engine.tokenizer) for s in samples):
        spans = completion.version_spans
        assert spans[0].start == 0 and spans[-1].stop == 48
        assert [span.version for span in spans] in ([0, 7], [7], [0])
        mixed += len(spans) == 2
        ids = completion.prompt_token_ids + completion.token_ids
        for span in spans:
            with torch.no_grad():
                logits = (old if span.version == 0 else new)(torch.tensor([ids])).logits[0].log_softmax(-1)
            for place in range(span.start, span.stop):
                at = len(completion.prompt_token_ids) + place
                assert completion.logprobs[place] == pytest.approx(logits[at - 1, ids[at]].item(), abs=1e-4)
    assert mixed > 0
    assert engine.stats().kv_tokens_free == engine.stats().kv_tokens


def test_versions_are_stamped(engine, model, prompts):
    (first,) = engine.generate(prompts[:1], SamplingParams(max_tokens=3, ignore_eos=True))
    assert first.version_spans == [VersionSpan(0, 3, 0)]
    assert engine.update_weights(model.named_parameters(), version=4).version == 4
    (second,) = engine.generate(prompts[:1], SamplingParams(max_tokens=3, ignore_eos=True))
    assert second.version_spans == [VersionSpan(0, 3, 4)]
    with pytest.raises(WeightError, match=r"version=4.*larger than.*4"):
        engine.update_weights(model.named_parameters(), version=4)


def test_the_same_version_may_come_again_when_its_weights_were_freed(engine, model, prompts):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (first,) = engine.generate(prompts[:1], params)
    engine.sleep(level=2)
    engine.wake_up()
    with pytest.raises(WeightError, match="version=-1"):
        engine.update_weights(model.named_parameters(), version=-1)
    engine.update_weights(model.named_parameters(), version=0)
    (again,) = engine.generate(prompts[:1], params)
    assert (first.request_id, first.token_ids) != (again.request_id, again.token_ids), (
        "a second sample, not the first"
    )
    (replayed,) = engine.generate(prompts[:1], params, request_ids=[first.request_id])
    assert replayed.token_ids == first.token_ids
    assert engine.stats().drafter == DRAFTER
    with pytest.raises(WeightError, match=r"version=0.*larger than.*0"):
        engine.update_weights(model.named_parameters(), version=0)


# --- faults: the drafter breaks, the output does not -----------------------------------------------------


def not_updated(engine, monkeypatch):
    monkeypatch.setattr(engine.backend.weights.drafter, "commit", lambda target, version: None)


def staging_lost(engine, monkeypatch):
    monkeypatch.setattr(engine.backend.weights.drafter, "stage", lambda piece: None)


def staging_raises(engine, monkeypatch):
    def stage(piece):
        raise ArithmeticError("no such kernel")

    monkeypatch.setattr(engine.backend.weights.drafter, "stage", stage)


def overwrite_weights(engine, monkeypatch, value):
    drafter, stage = engine.backend.weights.drafter, engine.backend.weights.drafter.stage
    monkeypatch.setattr(
        drafter, "stage", lambda piece: stage(replace(piece, weight=torch.full_like(piece.weight, value)))
    )


def zeroed(engine, monkeypatch):
    overwrite_weights(engine, monkeypatch, 0.0)


def not_a_number(engine, monkeypatch):
    overwrite_weights(engine, monkeypatch, float("nan"))


def raising(engine, monkeypatch):
    def propose(round):
        raise ZeroDivisionError("the guest tripped")

    monkeypatch.setattr(engine.backend.weights.drafter, "propose", propose)


def raising_where_it_computes(engine, monkeypatch):
    def model(drafter):
        raise ZeroDivisionError("the guest's head fell off")

    monkeypatch.setattr(type(engine.backend.weights.drafter), "model", property(model))


FAULTS = [
    (not_updated, "stale", "version 0, not 1"),
    (staging_lost, "raised", "linears were not staged"),
    (staging_raises, "raised", "no such kernel"),
    (zeroed, "low-acceptance", "canary"),
    (not_a_number, "nan", "NaN"),
    (raising, "raised", "the guest tripped"),
    (raising_where_it_computes, "raised", "the guest's head fell off"),
]


@pytest.mark.parametrize("canary", [True, False], ids=["canary", "no canary"])
@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize(("fault", "cause", "words"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_broken_drafter_is_reported_once_and_changes_nothing(
    make_engine, prompts, monkeypatch, caplog, fault, cause, words, verifier, canary
):
    model = make_model(0)
    speculation = {"drafter": DRAFTER, "verifier": verifier, "canary": canary, "canary_min_acceptance": 0.4}
    engine = make_engine(model, speculation=speculation)
    generate(engine, prompts)
    fault(engine, monkeypatch)
    optimize(model, steps=60)
    plain = make_engine(model, speculation={"drafter": "none", "verifier": verifier}, version=1)
    with caplog.at_level(logging.ERROR, logger="rollout_spec"):
        engine.update_weights(model.named_parameters())
        outputs = [engine.generate(prompts, PARAMS, request_ids=IDS) for _ in range(2)]
    if verifier == "coupled":
        assert tokens(outputs[0]) == tokens(outputs[1]) == generate(plain, prompts)
    (report,) = engine.stats().reports
    assert report.cause == cause and report.version == 1
    assert words in report.message or not canary
    assert len(caplog.records) == 1 and report.message in caplog.text
    assert engine.stats().drafter is None
    assert sum(completion.spec.drafted for completion in outputs[1]) == 0
    for completion in outputs[0]:
        logits = model(torch.tensor([completion.prompt_token_ids + completion.token_ids])).logits[0]
        start = len(completion.prompt_token_ids)
        expected = (
            logits[start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])
        )
        assert torch.allclose(torch.tensor(completion.logprobs), expected[:, 0], atol=1e-4)


def test_a_mended_drafter_is_used_again(make_engine, prompts, monkeypatch):
    model = make_model(0)
    engine = make_engine(model)
    with monkeypatch.context() as patch:
        raising(engine, patch)
        generate(engine, prompts)
        assert engine.stats().drafter is None
    engine.update_weights(model.named_parameters())
    assert engine.stats().drafter == DRAFTER
    assert sum(c.spec.accepted for c in engine.generate(prompts, PARAMS)) > 0


@pytest.mark.parametrize("level", [1, 2])
def test_an_update_stands_whatever_its_drafter_does_in_the_canary(make_engine, prompts, monkeypatch, level):
    model = make_model(0)
    engine = make_engine(model)
    generate(engine, prompts)
    raising_where_it_computes(engine, monkeypatch)
    engine.sleep(level)
    engine.update_weights(model.named_parameters())
    assert engine.stats().last_update.version == 1
    engine.wake_up()
    assert [report.cause for report in engine.stats().reports] == ["raised"]
    assert len(generate(engine, prompts)) > 0


def test_weights_that_slept_away_are_not_judged(make_engine, prompts):
    """An update while asleep owes a canary; if its weights are gone before the engine wakes there is nothing to judge."""
    model = make_model(0)
    engine = make_engine(model)
    generate(engine, prompts)
    engine.sleep()
    engine.update_weights(model.named_parameters())
    engine.sleep(2)
    engine.wake_up()
    assert not engine.stats().reports
    engine.update_weights(model.named_parameters())
    assert engine.stats().drafter == DRAFTER and not engine.stats().reports
