#!/usr/bin/env bash
# GRPO on the arithmetic task, on a CPU:  examples/verl/grpo_cpu.sh [more of verl's settings]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cpu.sh"

exec "$PYTHON" -m verl.trainer.main_ppo "${SETTINGS[@]}" algorithm.adv_estimator=grpo "$@"
