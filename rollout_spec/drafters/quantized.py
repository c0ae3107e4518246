"""The quantized self-drafter: the policy itself with quantized linears, reading the target's KV cache."""

from __future__ import annotations

from rollout_spec.drafters.base import DraftRound, Proposal, draft
from rollout_spec.drafters.quantize import QuantizedLinear, Quantizer
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.weights import Piece, is_linear, slots_of, weights_from_slots


class QuantizedSelfDrafter:
    """A copy of the target whose linears are quantized; embedding and norms are the target's own tensors.

    Drafting starts from the last emitted token and reads the target's cache entries before it. The entries it
    writes for its own draft tokens are provisional: the verification pass overwrites every one of them.

    Attributes:
        name: Kind of quantization.
        version: Policy version its weights were quantized from; -1 before the first `commit`.
        linears: Its quantized linears by slot (`layers.0.qkv`, ..., `lm_head`).
        quantizer: What quantizes the next update.
    """

    def __init__(self, quantizer: Quantizer, *, quantize_lm_head: bool = True) -> None:
        self.name = quantizer.name
        self.version = -1
        self.linears: dict[str, QuantizedLinear] = {}
        self.quantizer, self._quantize_lm_head = quantizer, quantize_lm_head
        self._staged: dict[str, QuantizedLinear] = {}
        self._model: Decoder | None = None

    @property
    def model(self) -> Decoder:
        """The decoder it drafts with."""
        assert self._model is not None, "nothing committed yet"
        return self._model

    def stage(self, piece: Piece) -> None:
        if self._is_quantized(piece.slot):
            self._staged[piece.slot] = self.quantizer.quantize(piece.weight, piece.bias)

    def commit(self, target: Decoder, version: int) -> None:
        slots = slots_of(target.weights)
        wanted = {slot for slot in slots if self._is_quantized(slot)}
        if wanted != self._staged.keys():
            raise RuntimeError(
                f"{len(wanted - self._staged.keys())} of {len(wanted)} linears were not staged"
            )
        self.linears, self._staged, self.version = self._staged, {}, version
        slots |= self.linears
        self._model = Decoder(target.spec, weights_from_slots(target.spec, slots), target.rope)

    def rollback(self) -> None:
        self._staged = {}

    def discard(self) -> None:
        self.linears, self._model, self.version = {}, None, -1

    def _is_quantized(self, slot: str) -> bool:
        return is_linear(slot) and (slot != "lm_head" or self._quantize_lm_head)

    def propose(self, round: DraftRound) -> Proposal:
        return draft(round, lambda tokens, step: round.forward(self.model, tokens, step))
