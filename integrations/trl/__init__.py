"""rollout-spec as the generation of TRL's GRPOTrainer, through its `rollout_func`."""
