#!/usr/bin/env bash
# Everything that is to be measured on a GPU, the most telling first, in under ten minutes:
#
#   benchmarks/gpu_check.sh [tests|sanitizer|bench|experiments]...
#
# Without an argument all stages share the time; one that is named alone has all of it, and what a stage leaves goes to
# those after it. TOTAL_S (default 560) is that time, OUT the folder of the results (default benchmarks/results). A
# stage that fails is reported and the rest goes on; the exit status is 1 if anything failed, and 2 where nothing can
# run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${OUT:-benchmarks/results}
total=${TOTAL_S:-560}
# From the checkout itself, so that timing does not depend on the build.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

declare -A share=([tests]=200 [sanitizer]=70 [bench]=150 [experiments]=140)
stages=("$@")
[ $# -gt 0 ] || stages=(tests sanitizer bench experiments)
sum=0
planned=0
for stage in "${stages[@]}"; do
  if [ -z "${share[$stage]:-}" ]; then
    echo "gpu_check.sh: expected stages of: tests sanitizer bench experiments, got: $stage" >&2
    exit 2
  fi
  sum=$((sum + share[$stage]))
done

gpu=$(python3 - <<'PYTHON'
import re, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_check.sh: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh: torch sees no CUDA device here")
name = torch.cuda.get_device_name()
model = re.search(r"\b[A-Z]+\d+\b", name)
print(model.group().lower() if model else re.sub(r"\W+", "_", name).strip("_").lower())
PYTHON
) || exit 2
capability=$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 2
mkdir -p "$out" || exit 2

lines=()
failed=0
stage_end=0

left() { echo $((stage_end - SECONDS > 1 ? stage_end - SECONDS : 1)); }

note() { lines+=("$(printf '%-12s %-34s %-18s %5s s' "$1" "$2" "$3" "$4")"); }

# run STAGE WHAT COMMAND...: within the stage's time, its output to the screen and to the stage's text file.
run() {
  local stage=$1 what=$2 start=$SECONDS status
  shift 2
  printf '\n=== %s: %s ===\n' "$stage" "$what" | tee -a "$out/gpu_${gpu}_$stage.txt"
  timeout --kill-after=10 "$(left)" "$@" 2>&1 | tee -a "$out/gpu_${gpu}_$stage.txt"
  status=$?
  case $status in
    0) status=ok ;;
    124 | 137) status="out of time" failed=1 ;;
    *) status="FAILED ($status)" failed=1 ;;
  esac
  note "$stage" "$what" "$status" $((SECONDS - start))
  [ "$status" = ok ]
}

find_sanitizer() {
  local place
  command -v compute-sanitizer && return
  for place in "${CUDA_HOME:-/usr/local/cuda}"/bin /usr/local/cuda*/bin /usr/local/cuda*/compute-sanitizer; do
    if [ -x "$place/compute-sanitizer" ]; then
      echo "$place/compute-sanitizer"
      return
    fi
  done
  return 1
}

# Of the packages named, those that are not there.
missing_packages() {
  python3 - "$@" <<'PYTHON'
import sys
from importlib.util import find_spec
print(" ".join(name for name in sys.argv[1:] if find_spec(name) is None))
PYTHON
}

stage_tests() {
  local missing
  missing=$(missing_packages pytest numpy setuptools pybind11 ninja)
  if [ -n "$missing" ]; then
    echo "missing packages, without which tests or the build fail: $missing"
    note tests "missing: $missing" FAILED 0
    failed=1
  fi
  missing=$(missing_packages hypothesis)
  if [ -n "$missing" ]; then
    echo "without $missing the tests of random groups are left out"
    note tests "random groups" "left out" 0
  fi
  # For this device alone, which takes a minute, and with the lines that the sanitizer names.
  run tests build env BSSN_CPU=1 BSSN_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" NVCC_APPEND_FLAGS=-lineinfo \
    python3 -m pip install --no-build-isolation --no-deps -e .
  # Most of the time is Triton's for compiling, which many workers do side by side.
  local workers=()
  [ -n "$(missing_packages xdist)" ] || workers=(-n auto)
  run tests "pytest tests/test_gpu.py" env BSSN_STRICT=1 python3 -m pytest -q tests/test_gpu.py
  run tests "pytest -m device" env BSSN_STRICT=1 python3 -m pytest -q --maxfail=20 "${workers[@]}" -m device \
    -k "cuda or triton"
}

# The same groups first without the tool, which also leaves their kernels compiled. Memory is not cached, so that every
# tensor is an allocation whose end the tool knows.
stage_sanitizer() {
  local tool small=(python3 -m benchmarks.experiments small --in-process)
  run sanitizer "small groups alone" "${small[@]}"
  if ! tool=$(find_sanitizer); then
    echo "compute-sanitizer is not on this machine"
    note sanitizer compute-sanitizer "FAILED: not found" 0
    failed=1
    return
  fi
  local check
  for check in memcheck racecheck synccheck initcheck; do
    run sanitizer "$check" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --report-api-errors no \
      --target-processes application-only --error-exitcode 9 "${small[@]}"
  done
}

# Told to end a little before they would be stopped. Curves, whole steps and the slow baselines only where the stage has
# the time to itself: a case with all of them took 51 s on an H200.
stage_bench() {
  local parts=()
  if [ ${#stages[@]} -gt 1 ]; then
    parts=(tables --provider parametrization hook foreach "parametrization graph" cuda "cuda graph" triton "triton graph")
  fi
  run bench "${parts[0]:-all parts}" python3 -m benchmarks.run "${parts[@]}" --device cuda \
    --json "$out/gpu_${gpu}_bench.jsonl" --deadline $(($(left) - 5))
}

stage_experiments() {
  run experiments all python3 -m benchmarks.experiments --json "$out/gpu_${gpu}_experiments.jsonl" \
    --deadline $(($(left) - 5))
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv
for stage in "${stages[@]}"; do
  : >"$out/gpu_${gpu}_$stage.txt"
  planned=$((planned + share[$stage]))
  stage_end=$((total * planned / sum))
  "stage_$stage"
done

printf '\n'
for stage in bench experiments; do
  if [[ " ${stages[*]} " == *" $stage "* ]]; then
    printf '%s ' "$stage"
    sed -n '/^summary$/,$p' "$out/gpu_${gpu}_$stage.txt"
    printf '\n'
  fi
done
{
  printf 'stages on %s\n' "$gpu"
  printf '%s\n' "${lines[@]}"
} | tee "$out/gpu_${gpu}_check.txt"
exit $failed
