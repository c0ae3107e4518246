"""Expand an eagle drafter of the arithmetic policy to one for its larger copy: as slow as its size, the same drafts.

    python examples/arithmetic/expand_drafter.py fold --out folded
    rollout-spec drafter train folded --out drafter
    python examples/arithmetic/expand_drafter.py expand --drafter drafter/step-00001600 --size 300m --out drafter-300m

The change of basis is that of `expand.py`, and so are the additions: new heads and channels read the stream with random
weights and write next to nothing. A drafter's state is what the target's head reads. The larger policy's last norm is
folded into its head, so the drafter to expand is trained on a copy of the policy of which the same is true: `fold` makes one.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from expand import SIZES, Expansion, Shape, unlikely_direction
from measure import POLICY
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rollout_spec.adaptive.checkpoint import Checkpoint, read_checkpoint, write_drafter

LAYER = "layers.0."


def fold(policy: Path, out: Path, padding: int = 64, seed: int = 0) -> None:
    """Write a copy of the policy whose last norm has weight 1: the head, untied for this, has taken it over.

    `padding` tokens are added that the policy never emits, as the larger one has thousands: a drafter that has not
    learnt to avoid them might draft nothing else there.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in policy.glob("*.json*"):
        shutil.copyfile(file, out / file.name)
    shutil.copyfile(policy / "chat_template.jinja", out / "chat_template.jinja")
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tensors = load_file(policy / "model.safetensors")
    norm, embed = (tensors[f"model.{name}.weight"] for name in ("norm", "embed_tokens"))
    rows = torch.cat([model.lm_head.weight.data, unlikely_direction(model, seed).expand(padding, -1)])
    tensors["lm_head.weight"] = (rows * norm.float()).to(embed.dtype)
    tensors["model.embed_tokens.weight"] = torch.cat([embed, torch.zeros_like(embed[:padding])])
    tensors["model.norm.weight"] = torch.ones_like(norm)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((policy / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "vocab_size": len(rows)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class DrafterExpansion(Expansion):
    """Also for linears that read several streams side by side."""

    def read(self, weight_Od: torch.Tensor, norm_d: torch.Tensor) -> torch.Tensor:
        parts = weight_Od.split(self.config.hidden_size, 1)
        return torch.cat([super(DrafterExpansion, self).read(part, norm_d) for part in parts], 1)


def expand_drafter(saved: Checkpoint, size: str | Shape, policy: Path = POLICY, seed: int = 0) -> Checkpoint:
    """The drafter for `expand(policy, ..., size, seed)`, of one trained on `fold(policy, ...)`.

    Raises:
        ValueError: The drafter is not of kind eagle.
    """
    shape = SIZES[size] if isinstance(size, str) else size
    spec, config = saved.spec, AutoConfig.from_pretrained(policy)
    if spec.kind != "eagle":
        raise ValueError(f"kind is {spec.kind!r}; train with --kind eagle")
    work = DrafterExpansion(config, shape, seed)  # its first random numbers are those of the policy's basis
    small = {name.removeprefix(LAYER).removesuffix(".weight"): w.float() for name, w in saved.weights.items()}
    plain = torch.ones(spec.hidden_size)
    small["input_layernorm"] = plain  # there is none
    layer = {**work.attention(small, trained=True), **work.mlp(small, trained=True)}
    weights = {f"{LAYER}{name}.weight": weight for name, weight in layer.items()}
    weights |= {
        f"{LAYER}post_attention_layernorm.weight": torch.ones(shape.hidden),
        "fc.weight": work.write(work.read(small["fc"], plain)),
    }
    larger = dataclasses.replace(
        spec,
        vocab_size=shape.vocab,
        draft_vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
    )
    return dataclasses.replace(saved, spec=larger, weights=weights, optimizer={})


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Expand a drafter of the arithmetic policy; its drafts stay the same."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    folding = commands.add_parser("fold", help="copy the policy with its last norm folded into the head")
    expanding = commands.add_parser("expand", help="expand a drafter that was trained on that copy")
    for command in (folding, expanding):
        command.add_argument("--policy", type=Path, default=POLICY, help="folder of the small policy")
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    expanding.add_argument(
        "--drafter", type=Path, required=True, help="checkpoint folder of the small drafter"
    )
    expanding.add_argument("--size", choices=sorted(SIZES), required=True)
    expanding.add_argument("--seed", type=int, default=0, help="that the policy was expanded with")
    args = parser.parse_args()
    if args.command == "fold":
        fold(args.policy, args.out)
    else:
        larger = expand_drafter(read_checkpoint(args.drafter), args.size, args.policy, args.seed)
        print(write_drafter(args.out, larger))


if __name__ == "__main__":
    main()
