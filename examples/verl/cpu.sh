# Shared by the CPU examples: verl on two CPU cores, with the arithmetic policy. Sourced, not run.
#
# Every value can be overridden behind the script's name, as Hydra has it. What makes the start short on a laptop:
# one worker of each kind (verl starts eight), one thread per process, no dashboard.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ARITHMETIC=$HERE/../arithmetic
PYTHON=${PYTHON:-python}
POLICY=${POLICY:-$ARITHMETIC/policy}
DATA=${DATA:-${XDG_CACHE_HOME:-$HOME/.cache}/rollout-spec/arithmetic-data}
WORKERS=${WORKERS:-1}   # trainer workers; each has a rollout server beside it

export VERL_PLATFORM=cpu            # loads our CPU platform for verl
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0

if [ ! -f "$DATA/train.parquet" ]; then
  "$PYTHON" "$ARITHMETIC/parquet.py" --out "$DATA" --train 4096 --test 256
fi

FP32='{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}'
SETTINGS=(
  data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet"
  data.train_batch_size=16 data.max_prompt_length=64 data.max_response_length=256 data.dataloader_num_workers=0
  reward.custom_reward_function.path="$ARITHMETIC/problems.py" reward.custom_reward_function.name=compute_score
  reward.num_workers=1

  actor_rollout_ref.model.path="$POLICY"
  +actor_rollout_ref.model.override_config.attn_implementation=eager
  actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.model.enable_gradient_checkpointing=False
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.optim.lr=1e-5
  actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16
  actor_rollout_ref.actor.use_torch_compile=False actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
  actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
  "+actor_rollout_ref.actor.fsdp_config.mixed_precision=$FP32"

  actor_rollout_ref.rollout.name=rollout_spec
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.dtype=float32
  actor_rollout_ref.rollout.calculate_log_probs=True
  actor_rollout_ref.rollout.max_num_seqs=64
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.n_gpus_per_node="$WORKERS"
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
  actor_rollout_ref.rollout.agent.num_workers=1

  trainer.device=cpu trainer.n_gpus_per_node="$WORKERS" trainer.nnodes=1 trainer.logger='["console"]'
  trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1 trainer.resume_mode=disable
  trainer.total_epochs=1
  ray_kwargs.ray_init.num_cpus=16 "+ray_kwargs.ray_init.num_gpus=$WORKERS"
  +ray_kwargs.ray_init.include_dashboard=False +ray_kwargs.ray_init.object_store_memory=300000000
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1
)
