"""Costs of passes from datasheets, for the simulator and as a prior until a machine has been measured.

Nothing here was measured on the devices named: peak figures are the vendor's, and a pass gets the stated part of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rollout_spec.policy.cost_model import TARGET, CostModel, PassCost

NF4 = "nf4"
NF4_BITS = 16 / 3.8  # per weight, with its scales: 3.8 times smaller than bf16

# Round figures with which the A100 comes near the published sweep in `tests/policy/data`; there they are tested.
MEMORY_EFFICIENCY, COMPUTE_EFFICIENCY = 0.8, 0.75
DRAFTER_EFFICIENCY = 0.6
LAUNCH_PER_LAYER = 20e-6


@dataclass(frozen=True)
class Device:
    """Datasheet values of one accelerator.

    Attributes:
        name: As the vendor spells it.
        flops: Peak bf16 arithmetic, dense, in FLOP/s.
        bandwidth: Peak memory bandwidth in bytes/s.
    """

    name: str
    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """Token rows from which a pass is bound by arithmetic and no longer by reading bf16 weights."""
        return self.flops / self.bandwidth


DEVICES = {
    device.name: device
    for device in (
        Device("A100-80GB", 312e12, 2.039e12),  # SXM
        Device("H100-SXM", 989e12, 3.35e12),
        Device("H200", 989e12, 4.8e12),
        Device("H20", 148e12, 4.0e12),
    )
}


@dataclass(frozen=True)
class ModelShape:
    """What of a decoder decides the cost of its passes.

    Attributes:
        layers: Decoder layers.
        parameters: Weights that every pass reads and every row is multiplied with: projections and lm_head. The
            embedding is not among them, for a row looks up one line of it.
        kv_bytes: Keys and values of one context token, all layers.
        query_width: Query heads times head size.
        expert_parameters: All routed experts of a mixture, all layers; 0 for dense models.
        expert_share: Routed experts per row over all of them.
        weight_bits: Bits of a weight of the target.
    """

    layers: int
    parameters: float
    kv_bytes: float
    query_width: int
    expert_parameters: float = 0.0
    expert_share: float = 0.0
    weight_bits: float = 16.0

    @property
    def active_parameters(self) -> float:
        """Weights that one row is multiplied with."""
        return self.parameters + self.expert_share * self.expert_parameters

    @property
    def weight_bytes(self) -> float:
        """Bytes that every pass reads; experts come on top, those that the rows touch."""
        return self.parameters * self.weight_bits / 8

    @classmethod
    def from_config(
        cls,
        *,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        intermediate_size: int,
        vocab_size: int,
        head_dim: int | None = None,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
        weight_bits: float = 16.0,
        kv_bits: float = 16.0,
    ) -> ModelShape:
        """From the fields of a Hugging Face config; gated MLPs, and in a mixture every layer has experts only
        (`intermediate_size` is then 0, or the width of the shared expert)."""
        head = head_dim or hidden_size // num_attention_heads
        queries, keys = num_attention_heads * head, num_key_value_heads * head
        attention = hidden_size * (2 * queries + 2 * keys)
        mlp = 3 * hidden_size * intermediate_size
        return cls(
            layers=num_hidden_layers,
            parameters=num_hidden_layers * (attention + mlp) + hidden_size * vocab_size,
            kv_bytes=num_hidden_layers * 2 * keys * kv_bits / 8,
            query_width=queries,
            expert_parameters=num_hidden_layers * num_experts * 3 * hidden_size * moe_intermediate_size,
            expert_share=num_experts_per_tok / num_experts if num_experts else 0.0,
            weight_bits=weight_bits,
        )


QWEN2_5_7B = ModelShape.from_config(
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
)


def from_datasheet(
    device: Device,
    shape: ModelShape,
    *,
    drafter_bits: float = NF4_BITS,
    memory_efficiency: float = MEMORY_EFFICIENCY,
    compute_efficiency: float = COMPUTE_EFFICIENCY,
    drafter_efficiency: float = DRAFTER_EFFICIENCY,
    launch_per_layer: float = LAUNCH_PER_LAYER,
) -> CostModel:
    """Costs of `target`, and of `nf4`: the same model with weights of `drafter_bits` on the target's own KV cache.

    With efficiencies of 1 and no launch time the cost ratio of the two is `(W / 3.8 + KV) / (W + KV)` for bytes of
    weights and of live context, for a target in bf16 that is far from the ridge.

    Args:
        device: Datasheet values.
        shape: The target.
        drafter_bits: Bits per weight of the drafter, scales included. All its linears count, lm_head too.
        memory_efficiency, compute_efficiency: Part of the peak that a pass gets.
        drafter_efficiency: Part of that which kernels on quantized weights get, of both, attention excepted.
        launch_per_layer: Time of a layer that neither reads nor computes, in seconds.
    """
    bandwidth, flops = device.bandwidth * memory_efficiency, device.flops * compute_efficiency
    target = PassCost(
        launch=launch_per_layer * shape.layers,
        per_sequence=0.0,
        weights=shape.weight_bytes / bandwidth,
        per_row=2 * shape.active_parameters / flops,
        per_kv_token=shape.kv_bytes / bandwidth,
        per_kv_row=4 * shape.query_width * shape.layers / flops,
        experts=shape.expert_parameters * shape.weight_bits / 8 / bandwidth,
        expert_share=shape.expert_share,
    )
    smaller = drafter_bits / shape.weight_bits / drafter_efficiency
    drafter = replace(
        target,
        weights=target.weights * smaller,
        experts=target.experts * smaller,
        per_row=target.per_row / drafter_efficiency,
    )
    return CostModel({TARGET: target, NF4: drafter})
