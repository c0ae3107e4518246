"""The spot trainer: workers that have finished their share of a rollout train the drafter until they are needed."""
