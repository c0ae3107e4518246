# Shared by the GPU examples: Qwen2.5-7B-Instruct on GSM8K, one node with 8 GPUs. Sourced, not run.
#
# NOT RUN by us: no such machine was at hand. A test composes these settings with verl's configuration and
# validates them; nothing else about them is known. Sizes follow verl's own GSM8K examples.

PYTHON=${PYTHON:-python}
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
DATA=${DATA:-$HOME/data/gsm8k}   # train.parquet and test.parquet, as verl's data preparation writes them
GPUS=${GPUS:-8}
KV_BYTES=${KV_BYTES:-$((32 << 30))}   # KV cache of a rollout server, freed while its GPU trains

SETTINGS=(
  data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet"
  data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024
  data.filter_overlong_prompts=True data.truncation=error

  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.model.enable_gradient_checkpointing=True
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8

  actor_rollout_ref.rollout.name=rollout_spec
  actor_rollout_ref.rollout.tensor_model_parallel_size=1   # one engine per GPU: 8 replicas
  actor_rollout_ref.rollout.n_gpus_per_node="$GPUS"
  actor_rollout_ref.rollout.max_num_seqs=256
  actor_rollout_ref.rollout.calculate_log_probs=True
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
  +actor_rollout_ref.rollout.engine_kwargs.rollout_spec.kv_cache_bytes="$KV_BYTES"

  trainer.n_gpus_per_node="$GPUS" trainer.nnodes=1 trainer.logger='["console"]'
  trainer.project_name=rollout_spec trainer.total_epochs=15 trainer.save_freq=20 trainer.test_freq=5
)
