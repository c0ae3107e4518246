"""Measurements behind `rollout-spec bench`: paired, interleaved, reported as medians of ratios with their spread."""
