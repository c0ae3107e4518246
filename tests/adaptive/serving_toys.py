"""A tiny policy, random drafters for it, and plain re-implementations to compare with."""

import math

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout_spec import RolloutEngine
from rollout_spec.drafters.eagle_spec import EagleSpec

VOCAB = 61


def make_model(seed=0):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, eos_token_id=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def make_engine(model, version=0, **options):
    speculation = {
        "drafter": "none", "adaptive": True, "draft_length": 4, "canary_min_acceptance": 0.0, "shadow": False,
    } | options.pop("speculation", {})  # fmt: skip
    options = {"dtype": "float32", "block_size": 16, "max_num_seqs": 16} | options
    return RolloutEngine.from_model(model, speculation=speculation, version=version, **options)


def make_spec(engine, kind="eagle", **options):
    return EagleSpec.for_target(engine.backend.spec, kind, **options)


def make_weights(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in spec.parameter_shapes().items():
        scale = 1 / math.sqrt(shape[-1])
        noise = torch.randn(shape, generator=generator)
        weights[name] = noise * scale if len(shape) == 2 else 1 + 0.1 * noise
    if spec.own_head:
        ids = torch.randperm(spec.vocab_size, generator=generator)[: spec.draft_vocab_size].sort().values
        weights["d2t"] = ids - torch.arange(len(ids))
        weights["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return weights


def prompts(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (1 + 7 * row,), generator=generator).tolist() for row in range(count)]


def _norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x, positions, theta):
    """x [T, heads, head_dim], the halves rotated against each other."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def reference_states(spec, weights, embed, tokens, features, drafts=()):
    """States [len(drafts) + 1, H] after the last pair of `tokens [T]` with `features [T - 1, F]`, and after each draft.

    Dense attention over all pairs, one state after the other as the chain goes on.
    """
    w = {name.removeprefix("layers.0."): tensor for name, tensor in weights.items()}
    eagle3, eps = spec.kind == "eagle3", spec.rms_norm_eps
    heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    fused = list(F.linear(features, w["fc.weight"]) if eagle3 else features)
    following, states = [*tokens[1:], *drafts], []
    for count in range(len(tokens) - 1, len(following) + 1):
        e, f = embed[torch.tensor(following[:count])], torch.stack(fused[:count])
        if eagle3:
            x = f
            read = torch.cat(
                (_norm(e, w["input_layernorm.weight"], eps), _norm(x, w["hidden_norm.weight"], eps)), 1
            )
        else:
            read = x = F.linear(torch.cat((e, f), 1), w["fc.weight"])
        at = torch.arange(count)
        q = _rotate(
            F.linear(read, w["self_attn.q_proj.weight"]).view(count, heads, size), at, spec.rope.theta
        )
        k = _rotate(F.linear(read, w["self_attn.k_proj.weight"]).view(count, kv, size), at, spec.rope.theta)
        v = F.linear(read, w["self_attn.v_proj.weight"]).view(count, kv, size)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores = scores.masked_fill(at[None, :] > at[:, None], -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + F.linear(mixed, w["self_attn.o_proj.weight"])
        h = _norm(x, w["post_attention_layernorm.weight"], eps)
        gated = F.silu(F.linear(h, w["mlp.gate_proj.weight"])) * F.linear(h, w["mlp.up_proj.weight"])
        x = x + F.linear(gated, w["mlp.down_proj.weight"])
        states.append(x[-1])
        fused.append(x[-1])
    return torch.stack(states)


@torch.no_grad()
def reference_features(model, tokens, layers):
    """Features [T, F] by transformers; `layers` as in `EagleSpec`."""
    streams = {}
    blocks = model.model.layers
    hooks = [
        block.register_forward_pre_hook(lambda _, args, i=i: streams.__setitem__(i, args[0][0].clone()))
        for i, block in enumerate(blocks)
    ]
    hooks.append(
        model.model.norm.register_forward_pre_hook(
            lambda _, args: streams.__setitem__(len(blocks), args[0][0].clone())
        )
    )
    final = model.model(torch.tensor([list(tokens)])).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return torch.cat([streams[i] for i in layers], 1) if layers else final
