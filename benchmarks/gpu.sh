#!/usr/bin/env bash
# make gpu: what only a GPU can show, in ten minutes, on a machine with torch, torchvision, Triton, pytest and no network.
# Builds the core in place, runs the battery of tests on CUDA tensors, one process for each operator, and times the quick
# cases in float32 and bfloat16. Logs: out/gpu; figures: benchmarks/results/<gpu>-<dtype>.json. TUNE=1 tunes first.
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
for op in $ops; do
  PYZOO_TEST_DEVICE=cuda timeout 240 "$PYTHON" -m pytest tests/test_ops.py -k "[$op-" >"$OUT/test_$op.txt" 2>&1 &
done
wait
failed=0
for op in $ops; do
  printf '%-24s %s\n' "$op" "$(tail -1 "$OUT/test_$op.txt")"
  grep -qE '^[0-9]+ passed' <(tail -1 "$OUT/test_$op.txt") || failed=1
done

if [ "${TUNE:-0}" = 1 ]; then
  step "tune"
  timeout 120 "$PYTHON" -m pyzoo tune --quick -o kernels/configs
fi

for dtype in float32 bfloat16; do
  step "benchmarks in $dtype"
  timeout 150 "$PYTHON" -m pyzoo bench --quick --device cuda --dtype "$dtype" -o "$OUT/$dtype" \
    --json "benchmarks/results/$gpu-$dtype.json" || failed=1
done
exit $failed
