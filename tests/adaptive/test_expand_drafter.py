"""The expanded drafter drafts for the expanded policy what the small one drafts for the small one."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from rollout_spec import RolloutEngine
from rollout_spec.adaptive.checkpoint import Checkpoint, read_checkpoint, write_drafter
from rollout_spec.adaptive.features import features_of
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.packing import pack
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.trainer import TrainConfig
from rollout_spec.drafters.eagle_spec import EagleSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

from expand import Shape, expand  # noqa: E402
from expand_drafter import expand_drafter, fold  # noqa: E402

POLICY = EXAMPLE / "policy"
SHAPE = Shape(hidden=384, layers=8, heads=12, kv_heads=3, intermediate=704, vocab=256)
TEXTS = ("12+7=", "34*5+6=", "(3+4)*81-7=")


def make_engine(path):
    speculation = {"drafter": "none", "history": False, "verifier": "rejection"}
    return RolloutEngine.from_pretrained(path, dtype="float32", speculation=speculation)


def make_saved(engine, kind="eagle"):
    spec = EagleSpec.for_target(engine.backend.spec, kind)
    module = EagleModule(spec, seed=4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return Checkpoint(spec, TrainConfig(), dict(module.state_dict()), {}, 7, 0, {})


def drafted(engine, saved):
    """Log-probabilities among the real tokens in every draft step along the texts."""
    target = engine.backend.weights.target
    tokens = [torch.tensor([ord(c) for c in text]) for text in TEXTS]
    features = features_of(target, saved.spec.feature_layers, tokens)
    batch = pack([Episode(str(i), t, f, 1, 0) for i, (t, f) in enumerate(zip(tokens, features))], 16)
    module, lent = saved.module(), TargetTensors.of(target)
    with torch.no_grad():
        steps = [
            module.logits(lent, states)[..., :128].log_softmax(-1) for states in module.unroll(lent, batch, 3)
        ]
    return torch.stack(steps)[:, batch.weights > 0]


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    fold(POLICY, folder := tmp_path_factory.mktemp("folded"))
    return make_engine(folder)


def test_folding_keeps_the_policy(folded):
    tokens = [ord(c) for c in TEXTS[2]]
    expected = torch.tensor(make_engine(POLICY).logprobs(tokens))
    assert (
        torch.tensor(folded.logprobs(tokens)) - expected
    ).abs().max() < 0.05  # the head is rounded to bfloat16


def test_every_draft_has_the_same_distribution(folded, tmp_path):
    saved = make_saved(folded)
    expand(POLICY, tmp_path / "policy", SHAPE, dtype="fp32")
    larger = read_checkpoint(write_drafter(tmp_path / "drafter", expand_drafter(saved, SHAPE)))
    assert larger.spec.hidden_size == 384 and larger.spec.vocab_size == 256 and larger.steps_done == 7
    assert {name: tuple(w.shape) for name, w in larger.weights.items()} == larger.spec.parameter_shapes()
    expected = drafted(folded, saved)
    found = drafted(make_engine(tmp_path / "policy"), larger)
    assert (found - expected).abs().max() < 0.05
    wrong = dataclasses.replace(
        saved, weights=saved.weights | {"fc.weight": saved.weights["fc.weight"] * 1.05}
    )
    assert (drafted(folded, wrong) - expected).abs().max() > 0.05  # the bound can fail


def test_drafters_that_cannot_be_expanded_are_refused(folded):
    with pytest.raises(ValueError, match="eagle"):
        expand_drafter(make_saved(folded, "eagle3"), SHAPE)
