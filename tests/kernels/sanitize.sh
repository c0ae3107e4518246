#!/usr/bin/env bash
# sanitize.sh SCRATCH [FLAG...]: builds the kernels with AddressSanitizer and UBSan and runs them on tight buffers.
# `SCRATCH/sanitize break` then runs them with an output one element too short.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../rollout_spec/kernels
scratch=$1
shift
${CXX:-g++} -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
  -ffp-contract=off -fno-strict-aliasing -mavx2 -mfma -mf16c -fopenmp "$@" "$here/sanitize.cpp" "$kernels"/*.cpp -o "$scratch/sanitize"
ASAN_OPTIONS=detect_leaks=1 OMP_NUM_THREADS=2 "$scratch/sanitize"
