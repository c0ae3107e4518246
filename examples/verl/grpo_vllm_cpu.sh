#!/usr/bin/env bash
# GRPO on the arithmetic task with verl's own vLLM rollout, and rollout-spec's plugin inside it, on a CPU.
# Needs a CPU build of vLLM; verl looks for a distribution called vllm, and vLLM for +cpu in its version.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu.sh"

export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export VLLM_NO_USAGE_STATS=1

PLUGIN=("+actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.rollout_spec={drafter:${DRAFTER:-int8}}")
if [ -n "${WITHOUT_PLUGIN:-}" ]; then PLUGIN=(); fi   # to compare

exec "$PYTHON" -m verl.trainer.main_ppo "${SETTINGS[@]}" algorithm.adv_estimator=grpo \
  actor_rollout_ref.rollout.name=vllm "${PLUGIN[@]}" \
  actor_rollout_ref.rollout.enforce_eager=True actor_rollout_ref.rollout.free_cache_engine=False \
  +actor_rollout_ref.rollout.enable_sleep_mode=False \
  actor_rollout_ref.rollout.max_model_len=320 actor_rollout_ref.rollout.max_num_batched_tokens=2048 \
  actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16 "$@"
