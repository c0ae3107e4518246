"""rollout-spec inside unmodified vLLM, through its plugin entry point."""
