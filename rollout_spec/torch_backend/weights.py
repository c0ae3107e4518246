"""The policy's weights on the device, the drafter made from them, and how both move to the next version."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollout_spec.config import SpeculationConfig
from rollout_spec.contracts import WeightError
from rollout_spec.drafters.base import Drafter
from rollout_spec.drafters.quantize import Quantizer, choose, get_quantizer, time_quantizers
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.models.decoder import Decoder, DecoderWeights
from rollout_spec.models.linear import make_linear
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import WeightAssembler, realize, weights_from_slots

TYPICAL_LENGTH = 4  # draft tokens, where the policy decides
_TYPICAL_BATCH = 4  # live sequences in the tail of a rollout, for which `auto` picks the kind of drafter


@dataclass(frozen=True)
class UpdateReport:
    """What a weight update cost.

    Attributes:
        version: The policy version now in force.
        seconds: From the first tensor to the last, waiting for the sender included; the commit comes after.
        quantize_seconds: The part spent quantizing the drafter.
        tensors: Tensors received.
        nbytes: Their bytes.
    """

    version: int
    seconds: float
    quantize_seconds: float
    tensors: int
    nbytes: int


class PolicyWeights:
    """Target and drafter, always of one version.

    An update is a transaction: tensors are packed and quantized as they arrive, beside the weights in force, and
    `commit` puts them all in force at once. A failed update leaves everything as it was. Its price is memory
    for a second copy while it lasts.

    Attributes:
        target: The decoder; the same object for life, its `weights` are replaced.
        drafter: The drafter, or None.
        drafter_error: Why the drafter could not follow the last update, or None. The policy's update does not
            fail with it: the drafter stays behind, and the guard sets it aside.
        version: Policy version in force.
    """

    def __init__(
        self,
        spec: ModelSpec,
        speculation: SpeculationConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.version = -1
        self.target = Decoder(spec, _NO_WEIGHTS, RotaryTable(spec, device, dtype, max_model_len))
        self.drafter: Drafter | None = _make_drafter(spec, speculation, dtype, device)
        self.drafter_error: Exception | None = None
        self._staged: DecoderWeights | None = None

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> UpdateReport:
        """`stage`, then `commit`."""
        report = self.stage(weights, version)
        self.commit(report)
        return report

    @torch.inference_mode()
    def stage(self, weights: Iterable[tuple[str, Tensor]], version: int) -> UpdateReport:
        """Receive a complete set of named tensors; nothing is in force before `commit`.

        Raises:
            WeightError: A name, shape or dtype does not fit, or tensors are missing; what was received is forgotten.
        """
        lowest = max(0, self.version + (self.target.weights is not _NO_WEIGHTS))
        if isinstance(version, bool) or not isinstance(version, int) or version < lowest:
            raise WeightError(
                f"version={version!r}: use an integer larger than the version in force, {self.version}"
            )
        start, tensors, nbytes, quantizing = time.perf_counter(), 0, 0, 0.0
        drafter, self.drafter_error = self.drafter, None
        assembler = WeightAssembler(self.spec, self.dtype, self.device)
        make = partial(make_linear, device=self.device)
        slots: dict[str, Any] = {}
        try:
            for name, tensor in pairs(weights):
                for piece in assembler.feed(name, tensor):
                    slots[piece.slot] = realize(piece, make)
                    before = time.perf_counter()
                    if drafter is not None and self.drafter_error is None:
                        try:
                            drafter.stage(piece)
                        except Exception as error:
                            self.drafter_error = error
                    quantizing += time.perf_counter() - before
                tensors, nbytes = tensors + 1, nbytes + tensor.nbytes
            assembler.finish()
        except BaseException:
            if drafter is not None:
                drafter.rollback()
            raise
        self._staged = weights_from_slots(self.spec, slots)
        return UpdateReport(version, time.perf_counter() - start, quantizing, tensors, nbytes)

    def commit(self, report: UpdateReport) -> None:
        """Put what was staged in force."""
        assert self._staged is not None, "nothing staged"
        self.target.weights, self._staged = self._staged, None
        self.version = report.version
        if self.drafter is None:
            return
        if self.drafter_error is not None:
            self.drafter.rollback()
            return
        try:
            self.drafter.commit(self.target, report.version)
        except Exception as error:
            self.drafter_error = error

    def quantizer(self, kind: str) -> Quantizer | None:
        """The kind's quantizer on this device; None for `none`."""
        return None if kind == "none" else get_quantizer(kind, self.device, self.dtype)

    def discard(self) -> None:
        """Free the weights (sleep level 2); the next update brings new ones."""
        self.target.weights = _NO_WEIGHTS
        if self.drafter is not None:
            self.drafter.discard()


_NO_WEIGHTS = DecoderWeights(torch.empty(0), (), torch.empty(0), lambda x: x)  # type: ignore[arg-type]


def pairs(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`weights` as they come; anything but (name, tensor) pairs is an error."""
    remedy = "send (name, tensor) pairs, such as model.named_parameters() or state_dict.items()"
    if isinstance(weights, Mapping) or not isinstance(weights, Iterable):
        raise WeightError(f"weights={type(weights).__name__}: {remedy}")
    for pair in weights:
        name, tensor = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair, None)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightError(f"weights: got {pair!r:.80}; {remedy}")
        yield name, tensor


def linear_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(N, K) of every linear of the model, the head included."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    layer = [
        (heads + 2 * spec.num_kv_heads * spec.head_dim, hidden),
        (hidden, heads),
        (2 * spec.intermediate_size, hidden),
        (hidden, spec.intermediate_size),
    ]
    return layer * spec.num_layers + [(spec.padded_vocab_size, hidden)]


def _make_drafter(
    spec: ModelSpec, speculation: SpeculationConfig, dtype: torch.dtype, device: torch.device
) -> Drafter | None:
    kind = speculation.drafter
    if kind == "auto":
        draft_length = speculation.draft_length or TYPICAL_LENGTH
        rows = (_TYPICAL_BATCH, _TYPICAL_BATCH * (draft_length + 1))
        timings = time_quantizers(linear_shapes(spec), device, dtype, rows)
        kind = choose(timings, draft_length).name
    if kind == "none":
        return None
    quantizer = get_quantizer(kind, device, dtype)
    return QuantizedSelfDrafter(quantizer, quantize_lm_head=speculation.quantize_lm_head)
