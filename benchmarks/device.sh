#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: builds for the GPU present, runs the whole
# test suite on it, compute-sanitizer over a subset that touches every kernel, the benchmarks, and an epoch of
# ICE with a ResNet-50 on as many images as Market-1501 has.
#
#   device.sh              all steps
#   device.sh build bench  these alone: the page of the benchmarks
#   device.sh build gcl    steps and memory of GCL's stages at the released sizes, which otherwise is left out
#
# Needs python3 with torch, torchvision, pillow, pybind11, ninja, setuptools, pytest, hypothesis, scikit-learn
# (cupy, cuvs, cuml: used if there), and a CUDA toolkit. Needs no network. Results go to $OUT (default:
# benchmarks/results/local):
#   summary.txt   one line a step: ok or FAILED, seconds
#   <step>.log    the output of each step
#   bench.json    the figures, with device, driver, versions and commit; bench.html is the page, with pictures,
#                 bench.txt the table
#   cost.json     likewise; written anew after each setting, cost.txt (the table) after the last
# A step that fails, or runs out of its time (124), does not stop those after it; the exit status counts them.
# A step has the seconds it is given, or what is left of the nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/local}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 FORCE_CUDA=1
failures=0 deadline=540 wanted=" $* "
: >"$out/summary.txt"

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  if [[ $wanted != "  " && $wanted != *" $name "* ]]; then return; fi
  if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 1)); then
    failures=$((failures + 1))
    printf '%-20s no time left\n' "$name" | tee -a "$out/summary.txt"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || rc=$?
  if [ $rc -eq 0 ]; then verdict=ok; else verdict="FAILED ($rc)"; failures=$((failures + 1)); fi
  printf '%-20s %-14s %4d s   %s\n' "$name" "$verdict" $((SECONDS - start)) \
    "$(tail -n 1 "$out/$name.log" | cut -c1-100)" | tee -a "$out/summary.txt"
}

capability=$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
  echo "device.sh: torch sees no CUDA device" | tee "$out/summary.txt"
  exit 1
}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

step build 120 env PYREID_EMULATED=1 python3 -m pip install --no-build-isolation --no-deps --no-index \
  --break-system-packages -e .
step info 10 python3 -m pyreid.info
step tests 150 python3 -m pytest -q tests -k "cuda or cupy" -p no:cacheprovider
# Each op against its reference: between them, these launch every kernel.
subset='torch-cuda and (test_matches_reference or test_parts or test_equals_scikit_learn'
subset+=' or test_overlap_matches_reference or test_distances_match_reference'
subset+=' or test_histogram_matches_reference or test_distance_matches_reference)'
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    python3 -m pytest -q tests -x -k "$subset" -p no:cacheprovider
done
# No case begins after the limit; the page is made of what there is. Alone, the benchmarks have more time.
if [[ $wanted == *" bench "* ]]; then limit=380; else limit=150; fi
step bench $((limit + 30)) python3 -m pyreid.cli bench --device cuda --limit "$limit" \
  --json "$out/bench.json" --html "$out/bench.html"
cp "$out/bench.log" "$out/bench.txt" 2>/dev/null
step cost 150 python3 -m benchmarks.cost --device cuda --images 12936 --steps 200 --test-batch 256 \
  --workers "$(nproc)" --precision float32,bfloat16 --channels-last --json "$out/cost.json"
[[ -f $out/cost.log ]] && sed -n "/^|/p" "$out/cost.log" >"$out/cost.txt"

# Only if it is named: with the others there is no time for it.
if [[ $wanted == *" gcl "* ]]; then
  step gcl 300 python3 -m benchmarks.gcl_cost --device cuda --steps 300 --workers "$(nproc)" --channels-last
fi

echo "$failures step(s) failed; results in $out"
exit $failures
