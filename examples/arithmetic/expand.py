"""Expand the arithmetic policy to a larger checkpoint that computes the same function, to time real sizes.

    python examples/arithmetic/expand.py --size 300m --out policy-300m

The larger model is as slow as its size and as clever as the small one. How the function is kept (d and D are
the hidden sizes, x the residual stream of the small model, P a random d x D matrix with orthonormal rows):

- The large stream is y = s P' x with s = sqrt(D / d), so its root mean square is that of x, and eps stays.
  RMSNorm weights are folded into the linear that follows and become 1; a linear that reads the stream becomes
  W diag(norm) P / s and one that writes to it becomes s P' W. P is dense, so all of these are.
- An original query head stays in the group of its original key/value head. The value space of each key/value
  head is turned by a random rotation that o_proj undoes. q_norm, k_norm and RoPE act inside a head and stay.
- New heads, MLP channels and layers read the stream with random weights of the trained weights' spread, and
  write to it with weights OUTPUT_SCALE times the trained spread: not zero, but too small to matter.
- lm_head is untied. Rows of the padded vocabulary lie near one direction w, found by least squares on hidden
  states h of worked solutions such that w . h is close to PAD_LOGIT for all of them.
"""

import argparse
import dataclasses
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import POLICY
from problems import sample, solve
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

OUTPUT_SCALE = 1e-6
PAD_LOGIT = -40.0
PAD_SPREAD = 0.02  # of the padded rows around their direction, relative to the trained spread
FIT_TEXTS = 150
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of the larger model; the head size and the number of positions are those of the policy."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000


SIZES = {
    "100m": Shape(hidden=640, layers=12, heads=10, kv_heads=5, intermediate=1792),  # 97 M parameters
    "300m": Shape(hidden=1024, layers=24, heads=16, kv_heads=4, intermediate=2560),  # 317 M parameters
    "7b": Shape(hidden=3584, layers=28, heads=56, kv_heads=8, intermediate=18944),  # 6.8 B; for a GPU
}


def check(shape: Shape, config: Qwen3Config) -> None:
    """Raise ValueError unless the policy fits into `shape`."""
    least = {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
    }
    for name, value in least.items():
        if getattr(shape, name) < value:
            raise ValueError(f"{name} is {getattr(shape, name)}; the policy needs at least {value}")
    group = config.num_attention_heads // config.num_key_value_heads
    if shape.heads % shape.kv_heads or shape.heads // shape.kv_heads < group:
        raise ValueError(
            f"heads is {shape.heads} and kv_heads {shape.kv_heads}; heads must be a multiple of kv_heads, "
            f"{group} or more times as many"
        )


class Expansion:
    """The change of basis from the policy's stream to the larger one, and random numbers for what is new."""

    def __init__(self, config: Qwen3Config, shape: Shape, seed: int):
        self.config, self.shape = config, shape
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        self.rng = random.Random(seed)
        self.P_dD = self.rotation(shape.hidden)[: config.hidden_size]
        self.scale = math.sqrt(shape.hidden / config.hidden_size)

    def rotation(self, size: int) -> torch.Tensor:
        """A random orthogonal (size, size) matrix."""
        return torch.linalg.qr(self.normal((size, size), 1.0))[0]

    def normal(self, size: tuple[int, ...], std: float | torch.Tensor) -> torch.Tensor:
        return torch.randn(size, generator=self.generator) * std

    def read(self, weight_Od: torch.Tensor, norm_d: torch.Tensor) -> torch.Tensor:
        """(O, d) behind an RMSNorm of weight `norm_d` -> (O, D) behind one of weight 1."""
        return (weight_Od * norm_d) @ self.P_dD / self.scale

    def write(self, weight_dI: torch.Tensor) -> torch.Tensor:
        """(d, I) -> (D, I)."""
        return self.scale * (self.P_dD.T @ weight_dI)

    def attention(self, w: dict[str, torch.Tensor], trained: bool) -> dict[str, torch.Tensor]:
        """Attention weights of a layer: with the heads of `w` if `trained`, else of their spread only."""
        hd, heads, kv_heads = self.config.head_dim, self.shape.heads, self.shape.kv_heads
        norm = w["input_layernorm"]
        q, k, v = (self.read(w[f"self_attn.{name}_proj"], norm).unflatten(0, (-1, hd)) for name in "qkv")
        o = self.write(w["self_attn.o_proj"]).unflatten(1, (-1, hd))
        D, inputs = self.shape.hidden, q.shape[2]
        new_q = self.normal((heads, hd, inputs), q.std())
        new_k, new_v = (self.normal((kv_heads, hd, inputs), x.std()) for x in (k, v))
        new_o = self.normal((D, heads, hd), OUTPUT_SCALE * o.std())
        if trained:
            group, new_group = len(q) // len(k), heads // kv_heads
            for old, slot in enumerate(self.rng.sample(range(kv_heads), len(k))):
                turn = self.rotation(hd)
                new_k[slot], new_v[slot] = k[old], turn @ v[old]
                for i, place in enumerate(self.rng.sample(range(new_group), group)):
                    new_q[slot * new_group + place] = q[old * group + i]
                    new_o[:, slot * new_group + place] = o[:, old * group + i] @ turn.T
        return {
            "self_attn.q_proj": new_q.flatten(0, 1),
            "self_attn.k_proj": new_k.flatten(0, 1),
            "self_attn.v_proj": new_v.flatten(0, 1),
            "self_attn.o_proj": new_o.flatten(1),
        }

    def mlp(self, w: dict[str, torch.Tensor], trained: bool) -> dict[str, torch.Tensor]:
        """MLP weights of a layer: with the channels of `w` if `trained`, else of their spread only."""
        norm = w["post_attention_layernorm"]
        gate, up = (self.read(w[f"mlp.{name}_proj"], norm) for name in ("gate", "up"))
        down = self.write(w["mlp.down_proj"])
        size = (self.shape.intermediate, self.shape.hidden)
        new_gate, new_up = (self.normal(size, x.std()) for x in (gate, up))
        new_down = self.normal(size[::-1], OUTPUT_SCALE * down.std())
        if trained:
            places = self.rng.sample(range(size[0]), len(gate))
            new_gate[places], new_up[places], new_down[:, places] = gate, up, down
        return {"mlp.gate_proj": new_gate, "mlp.up_proj": new_up, "mlp.down_proj": new_down}

    def layer(self, w: dict[str, torch.Tensor], trained: bool) -> dict[str, torch.Tensor]:
        ones = torch.ones(self.shape.hidden)
        norms = {"input_layernorm": ones, "post_attention_layernorm": ones.clone()}
        norms |= {name: w[name] for name in ("self_attn.q_norm", "self_attn.k_norm")}
        return {**self.attention(w, trained), **self.mlp(w, trained), **norms}

    def embedding(self, rows_Vd: torch.Tensor) -> torch.Tensor:
        """(V, d) -> (padded V, D); rows of the padded vocabulary are random of the trained spread."""
        rows = self.write(rows_Vd.T).T
        padding = self.normal((self.shape.vocab - len(rows), self.shape.hidden), rows.std())
        return torch.cat([rows, padding])

    def head(self, rows_Vd: torch.Tensor, norm_d: torch.Tensor, direction_d: torch.Tensor) -> torch.Tensor:
        """(V, d) -> (padded V, D); padded rows lie around `direction_d`."""
        rows = self.read(rows_Vd, norm_d)
        padding = self.normal((self.shape.vocab - len(rows), self.shape.hidden), PAD_SPREAD * rows.std())
        return torch.cat([rows, padding + self.read(direction_d[None], norm_d)])


@torch.inference_mode()
def unlikely_direction(model: Qwen3ForCausalLM, seed: int) -> torch.Tensor:
    """The (d,) row whose logit is closest to PAD_LOGIT on the states of worked solutions (training split)."""
    rng = random.Random(seed)
    states = []
    for problem in sample(FIT_TEXTS, seed, "train"):
        ids = torch.tensor([list((problem.prompt + solve(problem, rng)).encode("ascii"))])
        states.append(model.model(input_ids=ids, use_cache=False).last_hidden_state[0])
    states_Nd = torch.cat(states).double()
    target_N1 = torch.full((len(states_Nd), 1), PAD_LOGIT, dtype=torch.float64, device="cpu")
    return torch.linalg.lstsq(states_Nd.cpu(), target_N1).solution[:, 0].to(states_Nd.device, torch.float32)


def layer_weights(model: Qwen3ForCausalLM, index: int) -> dict[str, torch.Tensor]:
    """Weights of one layer by their name without `.weight`."""
    return {name.removesuffix(".weight"): p.data for name, p in model.model.layers[index].named_parameters()}


def expand(
    policy_dir: Path | str,
    out_dir: Path | str,
    size: str | Shape,
    seed: int = 0,
    dtype: str = "bf16",
    device: str = "cpu",
) -> int:
    """Write the larger checkpoint and a copy of the tokenizer to `out_dir`; returns its number of parameters.

    `size` is a key of SIZES or a Shape, `dtype` a key of DTYPES. In fp32 the log-probabilities of the real
    vocabulary agree with the policy's to about 1e-4; bf16 adds the rounding of the weights. It is computed on `device`,
    whose random numbers are its own.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; use one of {sorted(DTYPES)}")
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"size is {size!r}; use one of {sorted(SIZES)} or a Shape")
    shape = SIZES[size] if isinstance(size, str) else size
    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).to(device).eval()
    config = model.config
    check(shape, config)
    tensors = {}

    def put(name: str, weight: torch.Tensor) -> None:
        tensors[f"{name}.weight"] = weight.to(DTYPES[dtype], copy=True).cpu().contiguous()

    with torch.device(device):
        work = Expansion(config, shape, seed)
        norm = model.model.norm.weight.data
        put("model.embed_tokens", work.embedding(model.model.embed_tokens.weight.data))
        put("lm_head", work.head(model.lm_head.weight.data, norm, unlikely_direction(model, seed)))
        put("model.norm", torch.ones(shape.hidden))
        for index in range(shape.layers):
            old = index * config.num_hidden_layers // shape.layers
            last = (index + 1) * config.num_hidden_layers // shape.layers
            for name, weight in work.layer(layer_weights(model, old), trained=last > old).items():
                put(f"model.layers.{index}.{name}", weight)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    expanded_config(config, shape, DTYPES[dtype]).save_pretrained(out_dir)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(Path(policy_dir) / name, out_dir / name)
    return sum(weight.numel() for weight in tensors.values())


def expanded_config(config: Qwen3Config, shape: Shape, dtype: torch.dtype) -> Qwen3Config:
    """The configuration of the larger model."""
    values = config.to_dict()
    values.update(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=False,
        dtype=dtype,
        layer_types=["full_attention"] * shape.layers,
        max_window_layers=shape.layers,
    )
    return Qwen3Config.from_dict(values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Expand the arithmetic policy; the function stays the same.")
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the larger checkpoint")
    parser.add_argument("--policy", type=Path, default=POLICY, help="folder of the small checkpoint")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=32000, help="padded vocabulary, a multiple of 64")
    parser.add_argument("--device", default="cpu", help="where to compute it, such as cuda")
    args = parser.parse_args()
    shape = dataclasses.replace(SIZES[args.size], vocab=args.vocab)
    count = expand(args.policy, args.out, shape, args.seed, args.dtype, args.device)
    print(f"{args.size} in {args.dtype}: {count / 1e6:.1f} M parameters in {args.out}")


if __name__ == "__main__":
    main()
