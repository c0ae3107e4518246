"""Kinds of quantized linear. Import them through `rollout_spec.drafters.quantize`."""
