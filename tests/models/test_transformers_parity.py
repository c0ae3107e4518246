"""The decoder computes what transformers computes."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rollout_spec.models import elementwise, linear
from rollout_spec.models.rope import RotaryTable, inverse_frequencies, rotate
from rollout_spec.models.spec import ModelSpec

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
YARN_FULL = {
    **YARN,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "truncate": False,
}
YARN_FACTOR = {**YARN, "attention_factor": 0.83}
ROPES = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN, "yarn_full": YARN_FULL, "yarn_factor": YARN_FACTOR}


@pytest.fixture
def assert_same_logits(decoder_of, causal_attend):
    def check(model, rows=70, first_position=0, dtype=torch.float32, tolerance=1e-5):
        decoder = decoder_of(model, dtype)
        spec = decoder.spec
        tokens = torch.randint(spec.vocab_size, (rows,))
        positions = torch.arange(first_position, first_position + rows)
        theirs = model(tokens[None], position_ids=positions[None]).logits[0].float()
        logits = decoder.logits(decoder.hidden(tokens, positions, causal_attend(spec)))
        assert logits.shape == (rows, spec.padded_vocab_size)
        assert logits.dtype == torch.float32
        assert (logits[:, spec.vocab_size :] == -torch.inf).all()
        ours = logits[:, : spec.vocab_size]
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())

    return check


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_family_tied_and_untied(family, tied, seed, small_config, random_model, assert_same_logits):
    assert_same_logits(random_model(small_config(family, tie_word_embeddings=tied), seed))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("qwen2", {"num_key_value_heads": 1, "vocab_size": 128}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
        ("qwen3", {"num_hidden_layers": 1, "intermediate_size": 33}),
    ],
)
def test_biases_head_groups_and_odd_sizes(family, changes, small_config, random_model, assert_same_logits):
    assert_same_logits(random_model(small_config(family, **changes)))


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_kinds(kind, family, small_config, random_model, assert_same_logits):
    model = random_model(small_config(family, rope_parameters=dict(ROPES[kind])))
    assert_same_logits(model, rows=40)
    assert_same_logits(model, rows=40, first_position=450)


def test_long_positions(small_config, random_model, assert_same_logits):
    model = random_model(small_config("qwen3", max_position_embeddings=131_072, rope_theta=1e6))
    assert_same_logits(model, rows=30, first_position=131_000)


def test_one_row(small_config, random_model, assert_same_logits):
    assert_same_logits(random_model(small_config("qwen2")), rows=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_rounds_where_transformers_rounds(
    family, small_config, random_model, cast_parameters, decoder_of, causal_attend, monkeypatch
):
    """On stock kernels on both sides, whose sums are the same."""
    monkeypatch.setattr(elementwise, "kernels", lambda: None)
    monkeypatch.setattr(linear, "kernels", lambda: None)
    model = cast_parameters(random_model(small_config(family)), torch.bfloat16)
    decoder = decoder_of(model, torch.bfloat16)
    tokens = torch.randint(decoder.spec.vocab_size, (100,))
    ours = decoder.logits(decoder.hidden(tokens, torch.arange(100), causal_attend(decoder.spec)))
    theirs = model(tokens[None]).logits[0].float()
    same = ours[:, : decoder.spec.vocab_size] == theirs
    assert same.float().mean() > 0.99  # all, where F.linear and the packed kernel sum in the same order


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_no_further_from_float32_than_transformers_is(
    family, small_config, random_model, cast_parameters, decoder_of, causal_attend
):
    """Whatever kernels run: sums in another order change last bits, a rounding too many would add to the error."""
    full = random_model(small_config(family))
    model = cast_parameters(full, torch.bfloat16)
    decoder = decoder_of(model, torch.bfloat16)
    tokens = torch.randint(decoder.spec.vocab_size, (400,))
    exact, theirs = (m(tokens[None]).logits[0].float() for m in (full, model))
    ours = decoder.logits(decoder.hidden(tokens, torch.arange(400), causal_attend(decoder.spec)))
    ours = ours[:, : decoder.spec.vocab_size]
    assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm()


def test_bfloat16_rotation_is_theirs(small_config):
    spec = ModelSpec.from_hf_config(small_config("qwen3"))
    positions = torch.arange(spec.max_positions)
    cos, signed_sin = RotaryTable(spec, "cpu", torch.bfloat16)(positions)
    sin = torch.cat((-signed_sin[..., : spec.head_dim // 2], signed_sin[..., spec.head_dim // 2 :]), dim=-1)
    q = torch.randn(len(positions), spec.num_heads, spec.head_dim).to(torch.bfloat16)
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=0)
    assert torch.equal(rotate(q, cos, signed_sin), theirs[0])


@pytest.mark.parametrize("kind", ["default", *ROPES])
def test_cosines_and_sines_are_theirs(kind, small_config, random_model):
    rope = {"rope_parameters": dict(ROPES[kind])} if kind in ROPES else {"rope_theta": 5e5}
    config = small_config("llama", head_dim=64, **rope)
    spec = ModelSpec.from_hf_config(config)
    theirs = random_model(config).model.rotary_emb
    frequencies, scale = inverse_frequencies(spec.rope, spec.head_dim)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=3e-7, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)

    positions = torch.tensor([0, 1, 7, 100, 511])
    cos, signed_sin = (factor[:, 0] for factor in RotaryTable(spec, "cpu", torch.float32)(positions))
    their_cos, their_sin = (factor[0] for factor in theirs(torch.empty(1), positions[None]))
    half = spec.head_dim // 2
    torch.testing.assert_close(cos, their_cos, rtol=0, atol=2e-5)
    torch.testing.assert_close(signed_sin[:, half:], their_sin[:, half:], rtol=0, atol=2e-5)
    assert torch.equal(signed_sin[:, :half], -signed_sin[:, half:])


def test_table_length_can_be_chosen(small_config):
    spec = ModelSpec.from_hf_config(small_config("llama"))
    table = RotaryTable(spec, "cpu", torch.float32, length=8)
    table(torch.tensor([7]))
    with pytest.raises(IndexError):
        table(torch.tensor([8]))


def test_qwen3_head_size_default_is_transformers(small_config):
    config = small_config("qwen3").to_dict()
    del config["head_dim"]
    assert ModelSpec.from_hf_config(config).head_dim == Qwen3Config().head_dim
