#!/usr/bin/env bash
# All that one CUDA device shows, in under 8 minutes: the tests that compare it with the CPU, a step of 1B <- 8B, the loss, generation.
#
#   bash bench/gpu.sh [MODEL]     # MODEL: a small real model for generation, such as models/SmolLM2-135M-Instruct
#   DEVICE=cpu bash bench/gpu.sh  # the same script at a tiny size, to see that it runs
#
# A part that fails is named at the end, and the others run all the same. Paste what it prints into docs/benchmarks.md.
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python}
device=${DEVICE:-cuda}
model=${1:-}
failed=()

part() {
  echo "== $1"
  shift
  "$@" || failed+=("$*")
}

if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
  step=() loss=(--tokens 1024,8192 --reps 5)
  variants=("" "--compile" "--documents 32")
else
  step=(--student tiny --teacher tiny --tokens 128 --documents 4 --dtype fp32 --steps 1 --device cpu)
  loss=(--tokens 16 --vocab 512 --student-dim 32 --teacher-dim 64 --reps 1 --device cpu --dtype float32)
  variants=("")
fi

part "tests: the device against the CPU" "$python" -m pytest -q -p no:cacheprovider tests/gpu
for variant in "${variants[@]}"; do
  # shellcheck disable=SC2086  # a variant is several words
  part "a step of 1B <- 8B with random weights, $variant" "$python" bench/shapes.py "${step[@]}" $variant
done
# Liger's fused linear loss at 8,192 tokens and this vocabulary: 129 ms and 2.0 GB on an A100, as its authors publish.
part "the loss" "$python" bench/loss.py --impl matmul,fused,plain "${loss[@]}"
if [ -n "$model" ]; then
  part "generation" "$python" bench/generation.py "$model"
fi
for command in "${failed[@]}"; do echo "FAILED: $command"; done
[ ${#failed[@]} = 0 ]
