"""Sampling: one logits pipeline, counter-based noise, and two lossless verifiers."""
