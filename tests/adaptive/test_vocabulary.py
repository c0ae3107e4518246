"""A reduced vocabulary covers what it promises with as few tokens as it can."""

import pytest
import torch

from rollout_spec.adaptive.vocabulary import choose_draft_tokens, token_counts
from rollout_spec.contracts import InvalidRequest

from .training_toys import VOCAB, make_episodes, make_module, make_target


def test_the_fewest_tokens_that_cover():
    counts = torch.tensor([5, 0, 50, 1, 40, 0, 3, 1])
    assert choose_draft_tokens(counts, 0.9, multiple=1).tolist() == [2, 4]
    assert choose_draft_tokens(counts, 0.95, multiple=1).tolist() == [0, 2, 4]
    assert choose_draft_tokens(counts, 0.95, multiple=4).tolist() == [0, 2, 4, 6]
    assert choose_draft_tokens(counts, 1.0, multiple=4) is None


def test_responses_count_and_prompts_do_not():
    module, _ = make_module(make_target(), "eagle")
    episodes = make_episodes(module.spec, (5, 9), prompt=4)
    expected = [0] * VOCAB
    for episode in episodes:
        for token in episode.tokens[4:].tolist():
            expected[token] += 1
    assert token_counts(episodes, VOCAB).tolist() == expected


@pytest.mark.parametrize(("counts", "coverage"), [([0, 0], 0.9), ([1, 2], 0.0), ([1, 2], 1.5)])
def test_what_cannot_be_covered_is_refused(counts, coverage):
    with pytest.raises(InvalidRequest):
        choose_draft_tokens(torch.tensor(counts), coverage)
