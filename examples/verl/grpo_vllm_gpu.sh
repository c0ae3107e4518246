#!/usr/bin/env bash
# GRPO on verl's own vLLM rollout with rollout-spec's plugin, Qwen2.5-7B-Instruct on GSM8K, 8 GPUs.
# NOT RUN by us: only composed and validated, see gpu.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

exec "$PYTHON" -m verl.trainer.main_ppo "${SETTINGS[@]}" algorithm.adv_estimator=grpo \
  actor_rollout_ref.rollout.name=vllm \
  "+actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.rollout_spec={drafter:${DRAFTER:-nf4}}" \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.max_model_len=1536 \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
  actor_rollout_ref.actor.kl_loss_type=low_var_kl \
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16 \
  actor_rollout_ref.ref.fsdp_config.param_offload=True "$@"
