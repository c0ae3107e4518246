"""Proofs of exactness on a user's own model and machine: what `rollout-spec verify` runs."""
