"""rollout-spec as a rollout backend of unmodified verl, through its plugin entry point."""
