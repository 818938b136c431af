#!/usr/bin/env bash
# make gpu: what only a GPU can show, in ten minutes, on a machine with torch, torchvision, Triton, pytest and no network.
# Builds the core in place, runs the battery of tests on CUDA tensors, compiled kernels and Triton's, one process for each
# operator, and times the quick cases. Logs: out/gpu; figures: benchmarks/results/<gpu>-<dtype>.json. TUNE=1 tunes Triton's first.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
export PYTHONPATH=. CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch needs to be deterministic
mkdir -p "$OUT"

step() { printf '\n=== %s (after %d s)\n' "$1" "$SECONDS"; }

gpu=$("$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch sees no GPU")
print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1

step "build"
"$PYTHON" setup.py -q build_ext --inplace 2>&1 | tail -5
"$PYTHON" -m pyzoo info | tee "$OUT/info.txt"
step "tests on $gpu"
ops=$("$PYTHON" -c 'from tests.test_ops import SPECS; print(*(spec.name for spec in SPECS))')
failed=0
tell() { # the last line of a log, and whether all passed
  printf '%-32s %s\n' "$1" "$(tail -1 "$OUT/$1.txt")"
  grep -qE '^[0-9]+ passed' <(tail -1 "$OUT/$1.txt") || failed=1
}
for backend in cuda triton; do
  for op in $ops; do
    PYZOO_TEST_DEVICE=cuda PYZOO_BACKEND=$backend timeout 200 "$PYTHON" -m pytest tests/test_ops.py -k "[$op-" \
      >"$OUT/${backend}_$op.txt" 2>&1 &
  done
  wait
  for op in $ops; do tell "${backend}_$op"; done
done
timeout 60 "$PYTHON" -m pytest tests/test_gpu_device.py tests/test_cuda.py >"$OUT/device.txt" 2>&1
tell device
if command -v compute-sanitizer >/dev/null; then
  timeout 60 compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest tests/test_gpu_device.py -k stream >"$OUT/sanitizer.txt" 2>&1
  tail -1 "$OUT/sanitizer.txt"
fi

if [ "${TUNE:-0}" = 1 ]; then
  step "tune"
  timeout 120 "$PYTHON" -m pyzoo tune --quick -o kernels/configs
fi

bench() { # BACKEND DTYPE SECONDS FILE
  step "benchmarks of $1 in $2"
  PYZOO_BACKEND=$1 timeout "$3" "$PYTHON" -m pyzoo bench --quick --device cuda --dtype "$2" -o "$OUT/$1-$2" \
    --json "benchmarks/results/$gpu-$2$4.json" || failed=1
}
bench cuda float32 100 ""
bench cuda bfloat16 100 ""
bench triton float32 80 -triton
exit $failed
