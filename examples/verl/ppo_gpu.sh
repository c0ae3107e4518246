#!/usr/bin/env bash
# PPO with a critic, Qwen2.5-7B-Instruct on GSM8K, 8 GPUs. NOT RUN by us: only composed and validated, see gpu.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

exec "$PYTHON" -m verl.trainer.main_ppo "${SETTINGS[@]}" algorithm.adv_estimator=gae \
  critic.enable=True critic.strategy=fsdp2 critic.model.path="$MODEL" critic.optim.lr=1e-5 \
  critic.model.use_remove_padding=True critic.model.enable_gradient_checkpointing=True \
  critic.ppo_micro_batch_size_per_gpu=8 "$@"
