"""The training module computes what serving computes, and unrolling computes what drafting does."""

import pytest
import torch
import torch.nn.functional as F

from rollout_spec.adaptive.module import EagleModule
from rollout_spec.adaptive.packing import pack
from rollout_spec.contracts import InvalidRequest
from rollout_spec.drafters.eagle import EagleDrafter
from rollout_spec.drafters.eagle_spec import EagleSpec

from .training_toys import KINDS, VOCAB, make_episodes, make_module, make_target


class Cache:
    """A cache of one sequence for `EagleModel`, plain and slow."""

    def __init__(self):
        self.k, self.v = [], []

    def __call__(self, layer, q, k, v):
        rows = []
        for i in range(len(q)):
            self.k.append(k[i])
            self.v.append(v[i])
            keys, values = torch.stack(self.k, 1)[None], torch.stack(self.v, 1)[None]
            found = F.scaled_dot_product_attention(q[i][None, :, None], keys, values, enable_gqa=True)
            rows.append(found.flatten())
        return torch.stack(rows)

    def copy(self):
        other = Cache()
        other.k, other.v = list(self.k), list(self.v)
        return other


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_the_spec(kind):
    module, _ = make_module(make_target(), kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tables = {"d2t": (20,)} if kind == "reduced" else {}
    assert shapes == module.spec.parameter_shapes() | tables


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_unrolling_is_drafting_from_every_position(kind):
    target = make_target()
    module, tensors = make_module(target, kind)
    drafter = EagleDrafter(module.spec, target, module.state_dict().items(), 0)
    episodes = make_episodes(module.spec, (9, 6), prompt=0)
    batch = pack(episodes, 64)
    assert batch.tokens.shape == (2, 7)
    steps = list(module.unroll(tensors, batch, 4))
    for row, episode in enumerate(sorted(episodes, key=lambda e: -len(e.tokens))):
        cache = Cache()
        for begin in range(len(episode.tokens) - 2):  # the round's last pair of the target's features
            at, token = torch.tensor([begin]), episode.tokens[begin + 1 : begin + 2]
            state = drafter.model.hidden(token, at, episode.features[begin : begin + 1], cache, own=False)
            drafting = cache.copy()
            for step in range(4):
                place = begin + step
                if place >= len(episode.tokens) - 2:
                    break
                assert batch.drafts(step)[row, place]
                torch.testing.assert_close(steps[step][row, place], state[0], rtol=1e-4, atol=1e-4)
                full = drafter.logits(state)[0, :VOCAB]
                mine = module.logits(tensors, steps[step][row, place])
                drawn = full if module.draft_tokens is None else full[module.draft_tokens]
                torch.testing.assert_close(mine, drawn, rtol=1e-4, atol=1e-4)
                if place + 2 < len(episode.tokens):
                    token = episode.tokens[place + 2 : place + 3]
                    state = drafter.model.hidden(token, torch.tensor([place + 1]), state, drafting, own=True)


def test_the_targets_logits_come_from_the_features():
    target = make_target()
    state = torch.randn(5, 16)
    for kind in ("eagle", "eagle3"):
        module, tensors = make_module(target, kind)
        if kind == "eagle":
            features = state
            expected = target.logits(state)
        else:
            features = torch.cat((torch.randn(5, module.spec.feature_size - 16), state), 1)
            norm = torch.rms_norm(state, (16,), None, target.spec.rms_norm_eps) * target.weights.final_norm
            expected = target.logits(norm)
        torch.testing.assert_close(tensors.logits(module.spec, features), expected[:, :VOCAB])


def test_initial_weights_follow_the_seed():
    spec = EagleSpec.for_target(make_target().spec)
    a, b, c = (EagleModule(spec, seed=seed).fc.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "eagle2"}, "kind"),
        ({"kind": "eagle", "feature_layers": (1, 2)}, "feature_layers"),
        ({"kind": "eagle", "draft_vocab_size": 20}, "draft_vocab_size"),
        ({"feature_layers": (2, 1)}, "feature_layers"),
        ({"feature_layers": (0, 1)}, "feature_layers"),
        ({"feature_layers": (1, 3)}, "feature_layers"),
        ({"draft_vocab_size": VOCAB + 1}, "draft_vocab_size"),
    ],
)
def test_a_spec_refuses_what_the_target_cannot_have(options, field):
    with pytest.raises(InvalidRequest, match=f"^{field}="):
        EagleSpec.for_target(make_target().spec, **options)


def test_a_spec_survives_json():
    spec = EagleSpec.for_target(make_target().spec, draft_vocab_size=20)
    assert EagleSpec.from_dict(spec.to_dict()) == spec


def test_a_head_of_its_own_needs_its_tokens():
    spec = EagleSpec.for_target(make_target().spec, draft_vocab_size=20)
    with pytest.raises(InvalidRequest, match="draft_tokens"):
        EagleModule(spec)
