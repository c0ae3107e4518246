#!/usr/bin/env bash
# PPO with a critic on the arithmetic task, on a CPU:  examples/verl/ppo_cpu.sh [more of verl's settings]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu.sh"

exec "$PYTHON" -m verl.trainer.main_ppo "${SETTINGS[@]}" algorithm.adv_estimator=gae \
  critic.enable=True critic.strategy=fsdp2 critic.model.path="$POLICY" critic.optim.lr=1e-5 \
  critic.model.use_remove_padding=False critic.model.enable_gradient_checkpointing=False \
  +critic.model.override_config.attn_implementation=eager \
  critic.ppo_mini_batch_size=16 critic.ppo_micro_batch_size_per_gpu=16 \
  critic.fsdp.model_dtype=fp32 "+critic.fsdp.mixed_precision=$FP32" "$@"
