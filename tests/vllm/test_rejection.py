"""Draws of requests without a seed on a CPU: the distribution is vLLM's, the random numbers are fewer."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

pytest.importorskip("vllm")

from rollout_spec.integrations.vllm import draws, rejection
from rollout_spec.integrations.vllm.draws import OwnDraws
from rollout_spec.integrations.vllm.rejection import Unseeded, verify

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

SAMPLES, V = 30_000, 6


def sampling(temperature: Tensor) -> SimpleNamespace:
    return SimpleNamespace(
        temperature=temperature,
        all_greedy=False,
        all_random=bool((temperature > 0).all()),
        generators=Unseeded(),
    )


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Logits [3, V] of two drafted rows and the bonus row, and q [2, V]."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, V, generator=generator) * 1.5
    return logits, (logits[:2] + torch.randn(2, V, generator=generator)).softmax(-1)


def repeated(
    logits: Tensor, q: Tensor, given_q: Tensor | None, drafts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Emitted [SAMPLES, 3] of as many requests with two drafts each, from q if they are not given; and the drafts."""
    if drafts is None:
        drafts = torch.stack([torch.multinomial(row, SAMPLES, replacement=True) for row in q], 1)
    bonus = torch.multinomial(logits[2].softmax(-1), SAMPLES, replacement=True)[:, None]
    probs = None if given_q is None else given_q.repeat(SAMPLES, 1)
    emitted = verify(
        drafts.flatten(), [2] * SAMPLES, probs, logits[:2].repeat(SAMPLES, 1), bonus,
        sampling(torch.ones(SAMPLES)), 3,
    )  # fmt: skip
    return emitted, drafts


def p_values(emitted: Tensor, logits: Tensor) -> list[float]:
    """Of every position, among the samples that reach it."""
    found = []
    for column, p in zip(emitted.T, logits.double().softmax(-1)):
        counts = torch.bincount(column[column >= 0], minlength=V)
        found.append(float(chisquare(counts, p * counts.sum()).pvalue))
    return found


def test_every_position_has_the_targets_distribution(rows: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    logits, q = rows
    emitted, drafts = repeated(logits, q, q)
    assert min(p_values(emitted, logits)) > 1e-4
    accepted = (emitted[:, :2] == drafts).sum().item()
    assert 0.3 * SAMPLES < accepted < 1.9 * SAMPLES, "a drafter that is never rejected hides a wrong verifier"
    expected = float(torch.minimum(q[0], logits[0].softmax(-1)).sum())  # P(accepted) = sum min(p, q)
    # where the first draft was rejected the token is another one, so agreement means acceptance
    assert abs((emitted[:, 0] == drafts[:, 0]).double().mean().item() - expected) < 0.02


def test_another_q_than_that_of_the_drafts_is_seen(rows: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    logits, q = rows
    emitted, _ = repeated(logits, q, q.flip(0))
    assert min(p_values(emitted, logits)) < 1e-9


def test_a_proposals_only_choice_is_accepted_as_often_as_it_is_probable(rows: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    logits, q = rows
    drafts = torch.tensor([[1, 4]]).expand(SAMPLES, -1)
    emitted, _ = repeated(logits, q, None, drafts)
    assert min(p_values(emitted, logits)) > 1e-4
    p = logits.softmax(-1)
    assert abs((emitted[:, 1] >= 0).double().mean().item() - p[0, 1].item()) < 0.01


def test_a_draft_that_q_cannot_have_made_leaves_the_distribution(rows: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    logits, q = rows
    without = q.clone()
    without[0, 2] = 0.0
    drafts = torch.tensor([[2, 0]]).expand(SAMPLES, -1)
    emitted, _ = repeated(logits, q, without, drafts)
    assert (emitted[:, 1] == -1).all(), "what follows such a draft counts as not proposed either"
    assert p_values(emitted[:, :1], logits)[0] > 1e-4


@pytest.mark.parametrize("token", [-1, V, 2**31 - 1])
def test_a_draft_out_of_range_leaves_the_distribution(rows: tuple[Tensor, Tensor], token: int) -> None:
    torch.manual_seed(0)
    logits, q = rows
    drafts = torch.tensor([[token, 0]]).expand(SAMPLES, -1)
    for given in (q, None):
        emitted, _ = repeated(logits, q, given, drafts)
        assert (emitted[:, 1] == -1).all()
        assert p_values(emitted[:, :1], logits)[0] > 1e-4


def test_where_p_and_q_agree_everything_is_accepted(rows: tuple[Tensor, Tensor]) -> None:
    logits, _ = rows
    emitted, drafts = repeated(logits, logits[:2].softmax(-1), logits[:2].softmax(-1))
    assert (emitted[:, :2] == drafts).double().mean() > 0.9999 and (
        emitted[:, 2] >= 0
    ).double().mean() > 0.9999


def test_ragged_drafts_of_greedy_and_other_requests() -> None:
    """Each by the loop that it stands for; probabilities are such that chance decides nothing."""
    sure = torch.full((V, V), -1e4).fill_diagonal_(0.0)  # row i: token i, certainly
    lengths, temperature = [3, 0, 2, 1, 2], torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    target = [1, 2, 3, 4, 5, 0, 1, 2]  # what each drafted row chooses
    drafts = [
        1,
        2,
        0,
        4,
        5,
        3,
        1,
        0,
    ]  # wrong in the third of the first, in the fourth's only, and in the last's second
    bonus = torch.tensor([[5], [3], [2], [1], [4]])
    for given in (torch.full((8, V), 1 / V), None):
        emitted = verify(
            torch.tensor(drafts, dtype=torch.int32),
            lengths,
            given,
            sure[target],
            bonus.int(),
            sampling(temperature),
            4,
        )
        assert emitted.dtype == torch.int32
        assert emitted.tolist() == [
            [1, 2, 3, -1],
            [3, -1, -1, -1],
            [4, 5, 2, -1],
            [0, -1, -1, -1],
            [1, 2, -1, -1],
        ]


def test_greedy_requests_among_others_take_the_likeliest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, V)
    best, temperature = logits.argmax(-1), torch.tensor([0.0, 1.0] * 200)
    bonus = torch.zeros(400, 1, dtype=torch.int64)
    for given in (torch.full((400, V), 1 / V), None):
        right = verify(best, [1] * 400, given, logits, bonus, sampling(temperature), 2)
        assert (right[::2] == torch.stack((best, bonus[:, 0]), 1)[::2]).all()
        wrong = verify((best + 1) % V, [1] * 400, given, logits, bonus, sampling(temperature), 2)
        assert (wrong[::2, 0] == best[::2]).all() and (wrong[::2, 1] == -1).all()
        assert not (wrong[1::2, 0] == best[1::2]).all()
        assert not bonus.any()  # it is vLLM's


@dataclass
class SimpleMetadata:
    all_greedy: bool = False
    generators: dict[int, torch.Generator] = field(default_factory=dict)


class TestTheStandIn:
    def of(self, mode: str = "raw_logprobs") -> OwnDraws:
        class Original(torch.nn.Module):
            logprobs_mode = mode

            def forward(self, *args: Any) -> tuple[str, None]:
                return "vllm", None

        return OwnDraws(Original())

    def test_with_generators_of_seeds_or_none_at_all_vllm_draws(self) -> None:
        for generators in ({}, {0: torch.Generator()}):
            assert self.of()(torch.zeros(1, 4), generators, None, None)[0] == "vllm"

    def test_tokens_follow_the_logits_cut_by_k_and_p(self) -> None:
        torch.manual_seed(0)
        logits = torch.tensor([2.0, 1.0, 0.5, -1.0])
        k = torch.full((SAMPLES,), 3)
        tokens, returned = self.of()(logits.repeat(SAMPLES, 1), Unseeded(), k, None)
        counts = torch.bincount(tokens, minlength=4)
        assert returned is None and counts[3] == 0
        assert chisquare(counts[:3], logits[:3].double().softmax(-1) * SAMPLES).pvalue > 1e-3

    def test_what_the_logprobs_mode_asks_for_is_returned(self) -> None:
        logits = torch.randn(2, 4)
        assert torch.equal(self.of("processed_logits")(logits, Unseeded(), None, None)[1], logits)
        found = self.of("processed_logprobs")(logits, Unseeded(), None, None)[1]
        torch.testing.assert_close(found, logits.log_softmax(-1))


class TestWhoDraws:
    """`_sample` of a runner, wrapped."""

    def generators(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
        configured = changes.pop("configured", True)
        monkeypatch.setattr(draws, "options_of", lambda config: object() if configured else None)
        monkeypatch.setattr(draws, "is_coupled", lambda config: False)
        monkeypatch.setattr(draws, "fix_expand", lambda: None)
        metadata = SimpleMetadata(**changes.pop("metadata", {}))
        runner = SimpleNamespace(
            **{
                "vllm_config": None,
                "model_config": SimpleNamespace(seed=0),
                "speculative_config": object(),
                "device": torch.device("cpu"),
                "sampler": SimpleNamespace(topk_topp_sampler=torch.nn.Identity()),
                "input_batch": SimpleNamespace(sampling_metadata=metadata),
            }
            | changes
        )
        draws._sample(lambda runner, logits, metadata: None)(runner, None, None)
        stands_in = isinstance(runner.sampler.topk_topp_sampler, OwnDraws)
        return runner.input_batch.sampling_metadata.generators, stands_in

    def test_on_a_cpu_where_nobody_has_a_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generators, stands_in = self.generators(monkeypatch)
        assert isinstance(generators, Unseeded) and stands_in

    @pytest.mark.parametrize(
        "changes",
        [
            {"configured": False},
            {"speculative_config": None},
            {"device": torch.device("cuda")},
            {"model_config": SimpleNamespace(seed=0, use_fp64_gumbel=True)},
        ],
    )
    def test_elsewhere_vllm_draws(self, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
        assert self.generators(monkeypatch, **changes) == ({}, False)

    def test_a_batch_is_told_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = Unseeded()
        assert self.generators(monkeypatch, metadata={"generators": told})[0] is told

    @pytest.mark.parametrize("metadata", [{"all_greedy": True}, {"generators": {0: torch.Generator()}}])
    def test_vllm_draws_for_seeds_and_nobody_for_greedy_requests(
        self, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, Any]
    ) -> None:
        assert not isinstance(self.generators(monkeypatch, metadata=metadata)[0], Unseeded)


def test_synthetic_acceptance_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def original(draft_token_ids, num_draft_tokens, max_spec_len, draft_probs, target_logits, bonus_token_ids, sampling_metadata, synthetic_mode=False):  # fmt: skip
        return "vllm"

    monkeypatch.setattr(rejection, "verify", lambda *args: "here")
    wrapped, given = draws._verify(original), sampling(torch.ones(1))
    assert wrapped(None, [1], 1, None, None, None, given) == "here"
    assert wrapped(None, [1], 1, None, None, None, given, synthetic_mode=True) == "vllm"
    given.generators = {}
    assert wrapped(None, [1], 1, None, None, None, given) == "vllm"
