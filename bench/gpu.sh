#!/usr/bin/env bash
# Tests and records of a machine with a CUDA GPU, which is there for minutes:
#
#   bash bench/gpu.sh OUT        build, is it right, the step at batch 1, its stages: four minutes at most
#   bash bench/gpu.sh OUT rest   everything else, the most telling first: seven minutes at most
#   bash bench/gpu.sh --dry OUT  both, without a GPU: what would run is imported and collected
#
# Uses the torch that $PYTHON (python3) holds and downloads nothing. OUT gets three files, so that what a stage left
# is there whatever becomes of the next: all.tgz (logs and records, packed again after every stage), summary.txt
# (a line a stage), summary.md (the figures). Every stage is a process of its own with a hard limit, since a
# kernel that spins hears no signal and an error of the device fails all that follows in its process. The exit
# status is 1 if a stage failed.
set -euo pipefail
dry=
if [[ ${1-} == --dry ]]; then dry=yes && shift; fi
usage="usage: bash bench/gpu.sh [--dry] OUT [rest]"
out=$(realpath -m "${1:?$usage}")
part=${2:-first}
[[ $part == first || $part == rest ]] || { echo "$usage" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=build/gpu # survives from the first command to the second, on the same machine
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TEARDOWN_CUPTI=0 DISABLE_CUPTI_LAZY_REINIT=1 # the profiler, opened again and again beside CUDA graphs

if [[ $dry ]]; then
    work=build/gpu-dry # and only what such a machine holds can be imported
    export PYTHONPATH=$PWD/bench/dry${PYTHONPATH:+:$PYTHONPATH}
else
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "bench/gpu.sh needs a CUDA device, and torch in $python sees none" >&2; exit 1; }
fi
if [[ $part == first ]]; then rm -rf "$work"; fi
mkdir -p "$out" "$work"

failed=() planned=0 limit_of_all=0

keep() { # what there is goes to OUT
    tar -czf "$out/all.tgz.new" -C "$work" . && mv "$out/all.tgz.new" "$out/all.tgz"
    cp "$work/summary.txt" "$out/summary.txt"
    if [[ -e $work/summary.md ]]; then cp "$work/summary.md" "$out/summary.md"; fi
}

stage() { # name, seconds at most, command...; what it says is in NAME.txt too
    local name=$1 limit=$2 start=$SECONDS left status=0
    shift 2
    planned=$((planned + limit)) left=$((limit_of_all - SECONDS))
    if [[ $dry ]]; then limit=120; elif ((limit > left)); then limit=$left; fi
    if ((limit < 3)); then
        echo "$name: left out, no time" | tee -a "$work/summary.txt"
        return 1
    fi
    echo "== $name"
    timeout --signal=KILL "$limit" "$@" >"$work/$name.txt" 2>&1 || status=$?
    tail -n 12 "$work/$name.txt"
    ((status == 0)) || failed+=("$name")
    printf '%s: %s, %d s\n' "$name" "$( ((status)) && echo "failed ($status)" || echo done)" \
        $((SECONDS - start)) | tee -a "$work/summary.txt"
    keep
    return "$status"
}

module() { # name, seconds at most, module of bench, its arguments...
    local name=$1 limit=$2 module=$3
    shift 3
    if [[ $dry ]]; then set -- -c "import $module"; else set -- -m "$module" "$@"; fi
    stage "$name" "$limit" "$python" "$@"
}

tests() { # name, seconds at most, arguments of pytest...
    local name=$1 limit=$2
    shift 2
    # What hangs says where, before its limit.
    set -- -m gpu -v -p no:cacheprovider -o faulthandler_timeout=$((limit - 3)) "$@"
    stage "$name" "$limit" "$python" -m pytest "$@" ${dry:+--collect-only -q}
}

bench() { # name, seconds at most, shape, arguments of pytest...
    local name=$1 limit=$2 shape=$3
    shift 3
    tests "bench-$name" "$limit" --benchmark-only --shape "$shape" --dtype float16 \
        --benchmark-columns min,median,max,stddev --benchmark-json "$work/bench-$name.json" "$@"
}

summarise() {
    module summary 8 bench.summary "$work" || true
    cat "$work/summary.txt"
    if ((planned > limit_of_all)); then failed+=("limits: $planned s do not fit into $limit_of_all s"); fi
    planned=0
}

here() { "$python" -c 'import sys; from kvspn.engines import backends; sys.exit(backends()["cuda"])'; }

build() { # the CUDA backend for this GPU alone
    local nvcc
    nvcc=$(compgen -G '/usr/local/cuda*/bin/nvcc' | sort -V | tail -n 1) || true
    if ! command -v nvcc >/dev/null && [[ $nvcc ]]; then export PATH=${nvcc%/nvcc}:$PATH; fi
    if [[ $dry ]]; then
        stage build 100 true
        return
    fi
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .)
    case $capability in 90 | 10?) capability+=a ;; esac
    export KVSPN_CUDA=1 KVSPN_CUDA_ARCHS=$capability
    stage build 100 "$python" -m pip install -q --no-index --no-build-isolation --no-deps -e . && here
}

first() {
    limit_of_all=240
    build || { echo "the CUDA backend is not here: nothing to test" >&2; exit 1; }
    local mode modes=() right=() these
    for mode in kernels graph persistent; do
        if module "smoke-$mode" 9 bench.smoke "$mode"; then modes+=("$mode"); fi
    done
    for mode in ${modes[@]+"${modes[@]}"}; do
        if tests "tests-$mode" 18 tests/test_gpu_cuda.py -k "$mode"; then right+=("$mode"); fi
    done
    these=$(printf ' or %s' ${right[@]+"${right[@]}"})
    bench step 30 whisperM2M bench/test_step.py -k "batch1 and (${these# or })" || true
    module stages 12 bench.stages --json "$work/stages.json" || true
    summarise
}

rest() {
    limit_of_all=420
    if [[ ! $dry ]] && ! here; then build || exit 1; fi # on another machine than the first command's
    local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
    module machine 15 bench.machine || true
    tests tests-ops 40 tests/test_gpu.py || true
    bench step-others 60 whisperM2M bench/test_step.py -k "triton and batch1 or peer" || true
    bench batches 50 whisperM2M bench/test_step.py -k "persistent and (batch4 or batch32)" || true
    # The package's own kernels; torch's are not ours to check.
    if [[ ! $dry ]] && command -v compute-sanitizer >/dev/null; then
        stage memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 --kernel-regex kns=kvspn \
            --target-processes all "$python" -m bench.smoke persistent || true
        stage racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-regex kns=kvspn \
            --target-processes all "$python" -m bench.smoke kernels || true
    fi
    # What one step moves, and how fast.
    if [[ ! $dry ]] && command -v ncu >/dev/null; then
        stage ncu 40 ncu --clock-control none --kernel-name-base demangled --kernel-name regex:step_kernel \
            --launch-skip 3 --launch-count 1 --metrics "$metrics" "$python" -m bench.stages --steps 6 || true
    fi
    bench attention 40 whisperM2M bench/test_attention_peers.py || true
    bench ops 30 whisperM2M bench/test_ops.py || true
    bench small 25 small bench/test_ops.py bench/test_step.py -k "not peer" || true
    summarise
}

"$part"
if [[ $dry && $part == first ]]; then SECONDS=0 && rest; fi
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
