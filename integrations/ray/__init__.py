"""A pool of rollout engines on Ray, for trainers that bring no distributed rollout of their own."""
