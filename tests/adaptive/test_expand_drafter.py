"""The expanded drafter drafts for the expanded policy what the small one drafts for the small one."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from rollout_spec import RolloutEngine
from rollout_spec.adaptive.checkpoint import Checkpoint, read_checkpoint, write_drafter
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.offline import features_of
from rollout_spec.adaptive.packing import pack
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.trainer import TrainConfig
from rollout_spec.drafters.eagle_spec import EagleSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

from expand import Shape, expand  # noqa: E402
from expand_drafter import expand_drafter  # noqa: E402

POLICY = EXAMPLE / "policy"
SHAPE = Shape(hidden=384, layers=8, heads=12, kv_heads=3, intermediate=704, vocab=256)
TEXTS = ("12+7=", "34*5+6=", "(3+4)*81-7=")


def make_engine(path):
    speculation = {"drafter": "none", "history": False, "verifier": "rejection"}
    return RolloutEngine.from_pretrained(path, dtype="float32", speculation=speculation)


def make_saved(engine, kind="eagle3", draft_vocab=64):
    spec = EagleSpec.for_target(engine.backend.spec, kind, draft_vocab_size=draft_vocab)
    tokens = None if draft_vocab is None else torch.arange(3, 3 + draft_vocab)
    module = EagleModule(spec, tokens, seed=4)
    module.head_from(TargetTensors.of(engine.backend.weights.target))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return Checkpoint(spec, TrainConfig(), dict(module.state_dict()), {}, 7, 0, {})


def drafted(engine, saved):
    """Logits of every draft step along the texts."""
    target = engine.backend.weights.target
    tokens = [torch.tensor([ord(c) for c in text]) for text in TEXTS]
    features = features_of(target, saved.spec, tokens)
    batch = pack([Episode(str(i), t, f, 1, 0) for i, (t, f) in enumerate(zip(tokens, features))], 16)
    module, lent = saved.module(), TargetTensors.of(target)
    with torch.no_grad():
        steps = [module.logits(lent, states).log_softmax(-1) for states in module.unroll(lent, batch, 3)]
    return torch.stack(steps)[:, batch.weights > 0]


def test_every_draft_has_the_same_distribution(tmp_path):
    small = make_engine(POLICY)
    saved = make_saved(small)
    expand(POLICY, tmp_path / "policy", SHAPE, dtype="fp32")
    larger = read_checkpoint(write_drafter(tmp_path / "drafter", expand_drafter(saved, SHAPE)))
    assert larger.spec.hidden_size == 384 and larger.spec.feature_layers[-1] == 8 and larger.steps_done == 7
    assert {
        name: tuple(w.shape) for name, w in larger.weights.items() if name != "d2t"
    } == larger.spec.parameter_shapes()
    expected = drafted(small, saved)
    found = drafted(make_engine(tmp_path / "policy"), larger)
    assert (found - expected).abs().max() < 2e-3
    wrong = dataclasses.replace(
        saved, weights=saved.weights | {"fc.weight": saved.weights["fc.weight"] * 1.01}
    )
    assert (drafted(small, wrong) - expected).abs().max() > 2e-3  # the bound can fail


def test_drafters_that_cannot_be_expanded_are_refused():
    saved = make_saved(make_engine(POLICY), "eagle", None)
    with pytest.raises(ValueError, match="eagle3"):
        expand_drafter(saved, SHAPE)
