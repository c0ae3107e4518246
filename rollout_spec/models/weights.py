"""From named tensors, in any order, to the decoder's weights.

Hugging Face's tensors are merged into *slots*: the pieces the decoder runs on. Slots are `embed`, `final_norm`,
`lm_head` and, per layer i, `layers.i.` + `input_norm`, `qkv`, `qk_norm`, `o`, `post_norm`, `gate_up`, `down`.
To swap weights at once: `decoder.weights = weights_from_slots(spec, {**slots_of(decoder.weights), **new})`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollout_spec.contracts import WeightError
from rollout_spec.models.decoder import DecoderWeights, LayerWeights
from rollout_spec.models.linear import Linear, make_linear
from rollout_spec.models.spec import ModelSpec

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ACCEPTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")
_DERIVED = ".rotary_emb.inv_freq"  # old Llama checkpoints store it; it follows from the config
_LINEAR_SLOTS = ("qkv", "o", "gate_up", "down", "lm_head")


@dataclass(frozen=True)
class Piece:
    """One complete slot: weight ([N, K] of a linear, else the tensor itself) and the linear's bias [N], if any."""

    slot: str
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Part:
    """Where one checkpoint tensor goes: rows [start, stop) of a slot's weight or bias."""

    slot: str
    shape: tuple[int, ...]
    start: int
    stop: int
    is_bias: bool = False


@dataclass(frozen=True)
class _Slot:
    """Shape of a slot's weight, and whether it has a bias."""

    shape: tuple[int, ...]
    has_bias: bool = False


def _layout(spec: ModelSpec) -> tuple[dict[str, _Part], dict[str, _Slot]]:
    """Hugging Face name to place, for every tensor of the model, and slot to shape."""
    hidden, ff, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    parts: dict[str, _Part] = {}
    slots: dict[str, _Slot] = {}

    def whole(name: str, slot: str, *shape: int) -> None:
        parts[f"{name}.weight"] = _Part(slot, shape, 0, shape[0])
        slots[slot] = _Slot(shape)

    def merged(slot: str, block: str, columns: int, bias: bool, **rows_of: int) -> None:
        start = 0
        for projection, rows in rows_of.items():
            name = f"{block}.{projection}"
            parts[f"{name}.weight"] = _Part(slot, (rows, columns), start, start + rows)
            if bias:
                parts[f"{name}.bias"] = _Part(slot, (rows,), start, start + rows, is_bias=True)
            start += rows
        slots[slot] = _Slot((start, columns), bias)

    whole("model.embed_tokens", "embed", spec.vocab_size, hidden)
    for index in range(spec.num_layers):
        layer, block = f"layers.{index}", f"model.layers.{index}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        whole(f"{block}.input_layernorm", f"{layer}.input_norm", hidden)
        merged(f"{layer}.qkv", attention, hidden, spec.qkv_bias, q_proj=q, k_proj=kv, v_proj=kv)
        if spec.qk_norm:
            slot, heads, rotated = f"{layer}.qk_norm", spec.num_heads, spec.num_heads + spec.num_kv_heads
            parts[f"{attention}.q_norm.weight"] = _Part(slot, (head_dim,), 0, heads)
            parts[f"{attention}.k_norm.weight"] = _Part(slot, (head_dim,), heads, rotated)
            slots[slot] = _Slot((rotated, head_dim))
        merged(f"{layer}.o", attention, q, spec.o_bias, o_proj=hidden)
        whole(f"{block}.post_attention_layernorm", f"{layer}.post_norm", hidden)
        merged(f"{layer}.gate_up", mlp, hidden, spec.mlp_bias, gate_proj=ff, up_proj=ff)
        merged(f"{layer}.down", mlp, ff, spec.mlp_bias, down_proj=hidden)
    whole("model.norm", "final_norm", hidden)
    if not spec.tie_word_embeddings:
        whole("lm_head", "lm_head", spec.vocab_size, hidden)
        slots["lm_head"] = _Slot((spec.padded_vocab_size, hidden))
    return parts, slots


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape, for every tensor a checkpoint must hold; no `lm_head.weight` when it is tied."""
    return {name: part.shape for name, part in _layout(spec)[0].items()}


class WeightAssembler:
    """Merges a stream of named tensors into pieces, holding only those that are incomplete.

    Accepts exact Hugging Face names, also behind the wrappers' prefixes `module.` and `_orig_mod.`, in any order,
    in float32, bfloat16 or float16. Pieces never alias the tensors fed, so the caller may reuse its buffers. A tied
    model's `lm_head.weight`, which many trainers send as well, is accepted if it equals the embedding.

    Args:
        spec: The model.
        dtype: The engine's dtype, which every piece is cast to.
        device: Where pieces are assembled.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._parts, self._slots = _layout(spec)
        self._missing: dict[str, set[str]] = {}
        for name, part in self._parts.items():
            self._missing.setdefault(part.slot, set()).add(name)
        self._received: set[str] = set()
        self._incomplete: dict[str, Piece] = {}
        self._tied: dict[str, Tensor] = {}  # the embedding and the redundant head of a tied model, to compare

    def feed(self, name: str, tensor: Tensor) -> list[Piece]:
        """Take one tensor; return the pieces it completes (often none).

        Raises:
            WeightError: Unknown or repeated name, wrong shape or dtype, or a tied head that is not the embedding.
        """
        name = _canonical(name)
        if name.endswith(_DERIVED):
            return []
        redundant_head = self._spec.tie_word_embeddings and name == HEAD
        part = self._parts.get(EMBED if redundant_head else name)
        if part is None:
            raise self._unknown(name)
        if name in self._received:
            raise WeightError(f"{name}: received twice in one update; send every tensor once")
        _check(name, tensor, part.shape)
        self._received.add(name)
        if redundant_head:
            self._match_tied(HEAD, tensor.detach().to(device=self._device, dtype=self._dtype, copy=True))
            return []

        if part.slot not in self._incomplete:
            self._incomplete[part.slot] = self._allocate(part.slot)
        piece = self._incomplete[part.slot]
        target = piece.bias if part.is_bias else piece.weight
        target[part.start : part.stop].copy_(tensor.detach())  # type: ignore[index]
        self._missing[part.slot].remove(name)
        if self._missing[part.slot]:
            return []
        del self._missing[part.slot], self._incomplete[part.slot]
        if part.slot == "embed" and self._spec.tie_word_embeddings:
            self._match_tied(EMBED, piece.weight)
            return [piece, Piece("lm_head", self._padded(piece.weight))]
        return [piece]

    def finish(self) -> None:
        """Check that every tensor arrived.

        Raises:
            WeightError: Some are missing; the first few are named.
        """
        missing = [name for name in self._parts if name not in self._received]
        if missing:
            raise WeightError(
                f"{len(missing)} of {len(self._parts)} tensors are missing, among them {', '.join(missing[:4])}; "
                "send the complete model in one update"
            )

    def _allocate(self, slot: str) -> Piece:
        """Memory for a slot, uninitialised but for the head's padding."""
        shape = self._slots[slot].shape
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        if slot == "lm_head":
            weight[self._spec.vocab_size :] = 0
        bias = torch.empty(shape[:1], dtype=self._dtype, device=self._device)
        return Piece(slot, weight, bias if self._slots[slot].has_bias else None)

    def _padded(self, embedding: Tensor) -> Tensor:
        extra = self._spec.padded_vocab_size - self._spec.vocab_size
        return torch.nn.functional.pad(embedding, (0, 0, 0, extra)) if extra else embedding

    def _match_tied(self, name: str, tensor: Tensor) -> None:
        self._tied[name] = tensor
        if len(self._tied) == 2:
            if not torch.equal(*(torch.nan_to_num(self._tied[name]) for name in (EMBED, HEAD))):
                raise WeightError(
                    f"{HEAD} differs from {EMBED}, but the config says tie_word_embeddings=true; "
                    "set it to false, or send only the embedding"
                )
            self._tied.clear()

    def _unknown(self, name: str) -> WeightError:
        close = difflib.get_close_matches(name, self._parts, n=3)
        hint = (
            f"close: {', '.join(close)}"
            if close
            else f"expected names such as {', '.join(list(self._parts)[:3])}"
        )
        lora = "; merge the LoRA adapter into the model first" if "lora_" in name else ""
        return WeightError(f"{name}: not a tensor of this {self._spec.architecture}; {hint}{lora}")


def _canonical(name: str) -> str:
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if hasattr(tensor, "full_tensor"):
        raise WeightError(f"{name}: a sharded DTensor; send tensor.full_tensor()")
    if tensor.is_meta:
        raise WeightError(f"{name}: on the meta device, without values; materialise the model first")
    if tuple(tensor.shape) != shape:
        raise WeightError(
            f"{name}: shape {tuple(tensor.shape)}, but the config asks for {shape}; is it the same model?"
        )
    if tensor.dtype not in _ACCEPTED_DTYPES:
        raise WeightError(
            f"{name}: dtype {tensor.dtype}; send float32, bfloat16 or float16 (unquantized) weights"
        )


def is_linear(slot: str) -> bool:
    """Whether a slot holds a linear layer (and not an embedding or a norm)."""
    return slot.endswith(_LINEAR_SLOTS)


def realize(piece: Piece, make: Callable[[Tensor, Tensor | None], Linear] = make_linear) -> Tensor | Linear:
    """What the decoder holds for a piece: a linear made by `make(weight, bias)`, or the tensor itself."""
    return make(piece.weight, piece.bias) if is_linear(piece.slot) else piece.weight


def build_weights(
    spec: ModelSpec, pieces: Iterable[Piece], make: Callable[[Tensor, Tensor | None], Linear] = make_linear
) -> DecoderWeights:
    """A model's weights from all of its pieces, in any order."""
    return weights_from_slots(spec, {piece.slot: realize(piece, make) for piece in pieces})


def weights_from_slots(spec: ModelSpec, slots: Mapping[str, Any]) -> DecoderWeights:
    """Weights from slot name to tensor or linear, sharing them; a missing slot is a KeyError (`qk_norm` aside)."""
    names = [field.name for field in fields(LayerWeights)]

    def layer(index: int) -> LayerWeights:
        values = {name: slots[f"layers.{index}.{name}"] for name in names if name != "qk_norm"}
        return LayerWeights(qk_norm=slots[f"layers.{index}.qk_norm"] if spec.qk_norm else None, **values)

    return DecoderWeights(
        embed=slots["embed"],
        layers=tuple(layer(index) for index in range(spec.num_layers)),
        final_norm=slots["final_norm"],
        lm_head=slots["lm_head"],
    )


def slots_of(weights: DecoderWeights) -> dict[str, Any]:
    """Slot name to tensor or linear, the inverse of `weights_from_slots`."""
    slots = {"embed": weights.embed, "final_norm": weights.final_norm, "lm_head": weights.lm_head}
    for index, layer in enumerate(weights.layers):
        values = {field.name: getattr(layer, field.name) for field in fields(layer)}
        slots |= {f"layers.{index}.{name}": value for name, value in values.items() if value is not None}
    return slots


def load_weights(
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> DecoderWeights:
    """Assemble, check and build a whole model from named tensors; each piece is packed as it completes.

    Raises:
        WeightError: A tensor is unknown, repeated, missing, or of the wrong shape or dtype.
    """
    assembler = WeightAssembler(spec, dtype, device)
    make = partial(make_linear, device=device)
    slots = {
        piece.slot: realize(piece, make) for name, tensor in tensors for piece in assembler.feed(name, tensor)
    }
    assembler.finish()
    return weights_from_slots(spec, slots)
