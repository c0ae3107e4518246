"""Expand an eagle3 drafter of the arithmetic policy to one for its larger copy: as slow as its size, the same drafts.

    python examples/arithmetic/expand_drafter.py --drafter drafter/step-00001600 --size 300m --out drafter-300m

The change of basis is that of `expand.py`, and so are the additions: new heads and channels read the stream with random
weights and write next to nothing. The drafter needs a head of its own (`rollout-spec drafter train --kind eagle3
--coverage`), since its last norm, folded into the head here, is not the target's.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from expand import SIZES, Expansion, Shape
from measure import POLICY
from transformers import AutoConfig

from rollout_spec.adaptive.checkpoint import Checkpoint, read_checkpoint, write_drafter

LAYER = "layers.0."


class DrafterExpansion(Expansion):
    """Also linears that read two streams side by side, each behind its own norm."""

    def read(self, weight_Od: torch.Tensor, norm_d: torch.Tensor) -> torch.Tensor:
        parts = weight_Od.shape[1] // self.config.hidden_size
        pairs = zip(weight_Od.chunk(parts, 1), norm_d.chunk(parts))
        return torch.cat([super(DrafterExpansion, self).read(weight, norm) for weight, norm in pairs], 1)


def expand_drafter(
    saved: Checkpoint, size: str | Shape, policy: Path = POLICY, seed: int = 0, vocab: int = 0
) -> Checkpoint:
    """The drafter for `expand(policy, ..., size, seed)`.

    Args:
        saved: Of the small policy's.
        size: A key of SIZES or a Shape; `vocab` other than 0 replaces its padded vocabulary.
        policy, seed: As given to `expand`.

    Raises:
        ValueError: The drafter is not of kind eagle3 with a head of its own.
    """
    shape = SIZES[size] if isinstance(size, str) else size
    spec, config = saved.spec, AutoConfig.from_pretrained(policy)
    if spec.kind != "eagle3" or not spec.own_head:
        raise ValueError(f"kind is {spec.kind!r}; train with --kind eagle3 --coverage")
    work = DrafterExpansion(config, shape, seed)  # its first random numbers are those of the policy's basis
    small = {name.removeprefix(LAYER).removesuffix(".weight"): w.float() for name, w in saved.weights.items()}
    small["input_layernorm"] = torch.cat((small["input_layernorm"], small["hidden_norm"]))
    layer = {**work.attention(small, trained=True), **work.mlp(small, trained=True)}
    ones = torch.ones(shape.hidden)
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    weights = {f"{LAYER}{name}.weight": weight for name, weight in layer.items()}
    weights |= {f"{LAYER}{name}.weight": ones.clone() for name in norms}
    streams = torch.ones(spec.feature_size)
    weights |= {
        "fc.weight": work.write(work.read(small["fc"], streams)),
        "norm.weight": ones,
        "lm_head.weight": work.read(small["lm_head"], small["norm"]),
        "d2t": saved.weights["d2t"],
    }
    larger = dataclasses.replace(
        spec,
        vocab_size=vocab or shape.vocab,
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        feature_layers=tuple(i * shape.layers // config.num_hidden_layers for i in spec.feature_layers),
    )
    return dataclasses.replace(saved, spec=larger, weights=weights, optimizer={})


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Expand a drafter of the arithmetic policy; its drafts stay the same."
    )
    parser.add_argument("--drafter", type=Path, required=True, help="checkpoint folder of the small drafter")
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the larger one's checkpoint")
    parser.add_argument("--policy", type=Path, default=POLICY, help="folder of the small policy")
    parser.add_argument("--seed", type=int, default=0, help="that the policy was expanded with")
    args = parser.parse_args()
    print(
        write_drafter(
            args.out, expand_drafter(read_checkpoint(args.drafter), args.size, args.policy, args.seed)
        )
    )


if __name__ == "__main__":
    main()
