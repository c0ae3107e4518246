"""Named tensors in any order become the decoder's weights, or an error that says which and why."""

import dataclasses
import random

import pytest
import torch

from rollout_spec.contracts import WeightError
from rollout_spec.models.checkpoint import state_dict_from
from rollout_spec.models.linear import PackedLinear, PlainLinear
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import (
    Piece,
    WeightAssembler,
    build_weights,
    load_weights,
    realize,
    slots_of,
    weight_shapes,
    weights_from_slots,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def stream(small_config, random_model):
    """stream(family, **changes): spec and the model's tensors."""

    def make(family="qwen3", **changes):
        spec, tensors = state_dict_from(random_model(small_config(family, **changes)))
        return spec, dict(tensors)

    return make


def pieces_of(spec, tensors, dtype=torch.float32):
    assembler = WeightAssembler(spec, dtype)
    pieces = {piece.slot: piece for name, tensor in tensors for piece in assembler.feed(name, tensor)}
    assembler.finish()
    return pieces


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_names_and_shapes_are_those_of_transformers(family, changes, stream):
    spec, tensors = stream(family, **changes)
    if spec.tie_word_embeddings:
        del tensors[HEAD]
    assert weight_shapes(spec) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_pieces_are_fused_in_order(stream):
    spec, tensors = stream("llama", attention_bias=True, mlp_bias=True)
    shuffled = random.Random(0).sample(list(tensors.items()), len(tensors))
    pieces = pieces_of(spec, shuffled)
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    for slot, names in {
        "layers.1.qkv": [f"{attention}{p}_proj" for p in "qkv"],
        "layers.1.o": [f"{attention}o_proj"],
        "layers.1.gate_up": [f"{mlp}gate_proj", f"{mlp}up_proj"],
        "layers.1.down": [f"{mlp}down_proj"],
    }.items():
        assert torch.equal(pieces[slot].weight, torch.cat([tensors[f"{name}.weight"] for name in names]))
        assert torch.equal(pieces[slot].bias, torch.cat([tensors[f"{name}.bias"] for name in names]))
    head = pieces["lm_head"].weight
    assert head.shape == (spec.padded_vocab_size, spec.hidden_size)
    assert torch.equal(head[: spec.vocab_size], tensors[HEAD])
    assert not head[spec.vocab_size :].any()
    assert torch.equal(pieces["final_norm"].weight, tensors["model.norm.weight"])


def test_query_and_key_norms_are_laid_out_per_head(stream):
    spec, tensors = stream("qwen3")
    norm = pieces_of(spec, tensors.items())["layers.0.qk_norm"].weight
    q, k = (tensors[f"model.layers.0.self_attn.{which}_norm.weight"] for which in "qk")
    assert torch.equal(norm, torch.stack([q] * spec.num_heads + [k] * spec.num_kv_heads))


def test_a_piece_comes_with_its_last_tensor_and_nothing_complete_is_held(stream):
    spec, tensors = stream("qwen2", tie_word_embeddings=True)
    assembler = WeightAssembler(spec, torch.float32)
    prefix = "model.layers.0.self_attn."
    names = [f"{prefix}{p}_proj.{kind}" for kind in ("bias", "weight") for p in "vqk"]
    for name in names[:-1]:
        assert assembler.feed(name, tensors[name]) == []
    assert [piece.slot for piece in assembler.feed(names[-1], tensors[names[-1]])] == ["layers.0.qkv"]
    assert [piece.slot for piece in assembler.feed(EMBED, tensors[EMBED])] == ["embed", "lm_head"]
    assert assembler._incomplete == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_tensors_are_cast_to_the_engine_dtype(dtype, stream):
    spec, tensors = stream()
    pieces = pieces_of(spec, [(name, tensor.to(dtype)) for name, tensor in tensors.items()], torch.bfloat16)
    assert {piece.weight.dtype for piece in pieces.values()} == {torch.bfloat16}


def test_pieces_do_not_alias_what_was_fed(stream):
    """Trainers reuse their broadcast buffers and step their parameters in place."""
    spec, tensors = stream("qwen2", vocab_size=128)
    pieces = pieces_of(spec, tensors.items())
    before = {slot: piece.weight.clone() for slot, piece in pieces.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(pieces[slot].weight, before[slot]) for slot in pieces)


def test_wrapper_prefixes_are_stripped(stream):
    spec, tensors = stream()
    pieces_of(spec, [(f"module._orig_mod.{name}", tensor) for name, tensor in tensors.items()])


def test_stored_inverse_frequencies_are_not_weights(stream):
    spec, tensors = stream("llama")
    pieces_of(spec, [*tensors.items(), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))])


@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_head_may_be_sent_if_it_is_the_embedding(head_first, stream):
    spec, tensors = stream("llama", tie_word_embeddings=True)
    tensors[HEAD] = tensors[EMBED].clone()
    order = sorted(tensors.items(), key=lambda item: (item[0] == HEAD) != head_first)
    pieces_of(spec, order)
    tensors[HEAD][3, 2] += 1
    with pytest.raises(WeightError, match="tie_word_embeddings"):
        pieces_of(spec, [(name, tensors[name]) for name, _ in order])


def test_a_tied_head_of_padded_size_needs_no_second_copy(stream):
    spec, tensors = stream("llama", tie_word_embeddings=True, vocab_size=128)
    pieces = pieces_of(spec, tensors.items())
    assert pieces["lm_head"].weight.data_ptr() == pieces["embed"].weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", lambda t: t[:-1], "shape"),
        ("model.norm.weight", lambda t: t[None], "shape"),
        (HEAD, lambda t: t[:5], "shape"),
        ("model.norm.weight", lambda t: t.to(torch.int8), "dtype torch.int8"),
        ("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn), "dtype torch.float8"),
        ("model.norm.weight", lambda t: t.double(), "dtype torch.float64"),
        ("model.norm.weight", lambda t: t.to("meta"), "meta device"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_wrong_tensors_are_refused_by_name(name, change, message, tied, stream):
    spec, tensors = stream(tie_word_embeddings=tied)
    with pytest.raises(WeightError, match=f"^{name}: .*{message}"):
        WeightAssembler(spec, torch.float32).feed(name, change(tensors[name]))


def test_sharded_tensors_are_refused(stream):
    spec, tensors = stream()

    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    with pytest.raises(WeightError, match="full_tensor"):
        WeightAssembler(spec, torch.float32).feed(
            "model.norm.weight", tensors["model.norm.weight"].as_subclass(Sharded)
        )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.layers.0.self_attn.q_proj.wieght", "close: model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.3.input_layernorm.weight", "close: model.layers"),
        ("model.layers.0.self_attn.q_proj.bias", "close: model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge the LoRA adapter"),
        ("xyz", "expected names such as model.embed_tokens.weight"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name, hint, stream):
    spec, _ = stream()
    with pytest.raises(WeightError, match=hint):
        WeightAssembler(spec, torch.float32).feed(name, torch.zeros(1))


def test_a_tensor_sent_twice_is_refused(stream):
    spec, tensors = stream()
    with pytest.raises(WeightError, match="twice"):
        pieces_of(spec, [*tensors.items(), (f"module.{EMBED}", tensors[EMBED])])


def test_missing_tensors_are_counted_and_named(stream):
    spec, tensors = stream()
    assembler = WeightAssembler(spec, torch.float32)
    total = len(tensors)
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        del tensors[name]
    for name, tensor in tensors.items():
        assembler.feed(name, tensor)
    with pytest.raises(
        WeightError, match=f"2 of {total} tensors .*layers.2.mlp.up_proj.weight, model.norm.weight"
    ):
        assembler.finish()


def test_build_weights_uses_the_given_linear(stream):
    spec, tensors = stream("qwen2")
    weights = build_weights(spec, pieces_of(spec, tensors.items()).values(), PlainLinear)
    assert isinstance(weights.lm_head, PlainLinear)
    assert all(isinstance(layer.qkv, PlainLinear) for layer in weights.layers)
    assert torch.equal(weights.layers[0].down.dense(), tensors["model.layers.0.mlp.down_proj.weight"])


def test_slots_round_trip_without_copies(stream):
    for family in ("llama", "qwen3"):
        spec, tensors = stream(family)
        weights = load_weights(spec, tensors.items(), torch.float32)
        assert weights_from_slots(spec, slots_of(weights)) == weights
        assert weights_from_slots(spec, slots_of(weights)).embed is weights.embed


def test_weights_are_swapped_at_once(stream, decoder_of, random_model, small_config, causal_attend):
    config = small_config("qwen3")
    old, new = random_model(config, seed=0), random_model(config, seed=1)
    decoder, expected = decoder_of(old), decoder_of(new)
    before = decoder.weights
    _, tensors = state_dict_from(new)
    staged = {slot: realize(piece) for slot, piece in pieces_of(decoder.spec, tensors).items()}
    assert decoder.weights is before  # staging does not touch what is running
    decoder.weights = weights_from_slots(decoder.spec, {**slots_of(decoder.weights), **staged})

    tokens, attend = torch.arange(9), causal_attend(decoder.spec)
    assert torch.equal(decoder.hidden(tokens, tokens, attend), expected.hidden(tokens, tokens, attend))


def test_a_drafter_shares_embedding_and_norms_and_owns_its_linears(stream):
    spec, tensors = stream("qwen3")
    target = load_weights(spec, tensors.items(), torch.float32)
    layers = tuple(
        dataclasses.replace(layer, qkv=PlainLinear(layer.qkv.dense().bfloat16().float()))
        for layer in target.layers
    )
    drafter = dataclasses.replace(target, layers=layers)
    assert isinstance(target.layers[0].qkv, PackedLinear)
    assert drafter.embed.data_ptr() == target.embed.data_ptr()
    assert drafter.layers[2].qk_norm.data_ptr() == target.layers[2].qk_norm.data_ptr()
    assert drafter.layers[1].qkv is not target.layers[1].qkv
    assert drafter.layers[1].o is target.layers[1].o


def test_norm_pieces_are_realized_as_they_are():
    piece = Piece("layers.0.input_norm", torch.ones(3))
    assert realize(piece) is piece.weight


def test_spec_without_tying_needs_the_head(small_config):
    spec = ModelSpec.from_hf_config(small_config("llama"))
    assert weight_shapes(spec)[HEAD] == (150, 48)
