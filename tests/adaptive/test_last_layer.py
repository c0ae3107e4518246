"""A drafter that starts as the target's last layer."""

import pytest
import torch
import torch.nn.functional as F

from rollout_spec.adaptive.acceptance import measure
from rollout_spec.adaptive.features import episodes_of, features_of
from rollout_spec.adaptive.last_layer import start_as_last_layer
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.packing import pack
from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import InvalidRequest, SamplingParams
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import example_folder, load_problems

from .training_toys import VOCAB, make_module, make_target


def same_norm_everywhere(weights):
    """Then the stream has the length of what the drafter makes of it, but for a factor."""
    weights["model.norm.weight"].fill_(0.7)


def no_mlp(weights):
    """Then no norm of the stream matters but the first, which is the same for all tokens."""
    weights["model.layers.0.mlp.down_proj.weight"].zero_()


@pytest.mark.parametrize("change", [same_norm_everywhere, no_mlp])
def test_where_the_guess_is_exact_and_norms_are_linear_it_is_the_layer(change):
    """The only layer reads the embedding of the token, which the pair holds."""

    def changed(weights):
        change(weights)
        weights["model.embed_tokens.weight"].sign_()  # of one length

    target = make_target("LlamaForCausalLM", 1, changed)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (40, 31, 52, 48) * 100]
    module = EagleModule(EagleSpec.for_target(target.spec, "eagle"), seed=3)
    start_as_last_layer(module, target, sequences)
    for ids in sequences[:4]:
        (features,) = features_of(target, (), [ids])
        batch = pack([Episode("e", ids, features, 1, 0)], len(ids))
        (states,) = module.unroll(TargetTensors.of(target), batch, 1)
        (wanted,) = features_of(target, (), [ids[1:]])  # a drafter has no pair for the first token
        alike = F.cosine_similarity(states[0, : len(ids) - 2], wanted[: len(ids) - 2])
        assert alike.min() > 0.999


def test_drafts_of_the_shipped_policy_are_accepted_before_any_training():
    engine = RolloutEngine.from_pretrained(
        example_folder() / "policy", dtype="float32", speculation={"drafter": "none", "history": False}
    )
    target, spec = engine.backend.weights.target, EagleSpec.for_target(engine.backend.spec, "eagle")
    params = SamplingParams(max_tokens=48, seed=0)
    episodes = episodes_of(target, spec, engine.generate(list(load_problems().prompts(160, 0)), params))
    module = EagleModule(spec, seed=0)
    tensors = TargetTensors.of(target)
    assert measure(module, tensors, episodes[:40], 2).alpha[0] < 0.15
    start_as_last_layer(module, target, [episode.tokens for episode in episodes[40:]])
    found = measure(module, tensors, episodes[:40], 2).alpha
    assert found[0] > 0.4 and found[1] > 0.35


def test_what_cannot_start_so_is_refused():
    target = make_target()
    ids = [torch.arange(30), torch.arange(30)]
    with pytest.raises(InvalidRequest, match="kind='eagle3'"):
        start_as_last_layer(make_module(target, "eagle3")[0], target, ids)
    with pytest.raises(InvalidRequest, match="sequences='29 pairs of tokens': give at least 32"):
        start_as_last_layer(make_module(target, "eagle")[0], target, ids[:1])
