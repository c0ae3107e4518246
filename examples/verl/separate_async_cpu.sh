#!/usr/bin/env bash
# Asynchronous GRPO on a CPU: one worker trains, and lends its server to the rollout; another only rolls out.
# Weight updates interrupt answers, which are then continued under the new policy.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu.sh"

exec "$PYTHON" -m verl.trainer.main_ppo "${SETTINGS[@]}" algorithm.adv_estimator=grpo \
  trainer.v1.trainer_mode=separate_async trainer.v1.separate_async.parameter_sync_step=2 \
  data.train_batch_size=32 actor_rollout_ref.hybrid_engine=True \
  actor_rollout_ref.rollout.nnodes=1 ++ray_kwargs.ray_init.num_gpus=2 \
  actor_rollout_ref.rollout.checkpoint_engine.backend=rollout_spec_cpu \
  actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=rollout_spec.integrations.verl.checkpoint_cpu "$@"
