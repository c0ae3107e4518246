"""A tiny target, drafters for it, and episodes that it did not sample: training does not ask."""

import torch

from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.samples import Episode
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import load_weights, weight_shapes

VOCAB = 37
KINDS = ("eagle", "eagle3", "reduced")


def make_target(architecture="Qwen3ForCausalLM", layers=2, change=None):
    """A small decoder in float32; `change` may overwrite its weights, by their names."""
    spec = ModelSpec.from_hf_config(
        {
            "architectures": [architecture], "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 64, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in weight_shapes(spec).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 0.5 * noise if len(shape) == 2 else 1 + 0.1 * noise
    if change is not None:
        change(weights)
    made = load_weights(spec, weights.items(), torch.float32)
    return Decoder(spec, made, RotaryTable(spec, "cpu", torch.float32))


def make_module(target, kind, seed=0):
    """Returns the module and what it reads of the target."""
    size = 20 if kind == "reduced" else None
    spec = EagleSpec.for_target(target.spec, "eagle" if kind == "eagle" else "eagle3", draft_vocab_size=size)
    tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:20].sort().values
    module = EagleModule(spec, tokens if size else None, seed=seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    tensors = TargetTensors.of(target)
    module.head_from(tensors)
    return module, tensors


def make_episodes(spec, lengths=(3, 5, 9, 14, 30), prompt=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Episode(
            f"e{i}",
            torch.randint(0, VOCAB, (n,), generator=generator),
            torch.randn(n - i % 2, spec.feature_size, generator=generator),
            prompt,
            0,
            torch.tensor([n - 1, n - 2][: 1 + i % 2]).sort().values,
        )
        for i, n in enumerate(lengths)
    ]
