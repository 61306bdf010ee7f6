#!/usr/bin/env bash
# Tests and records of a machine with a CUDA GPU: bash bench/gpu.sh OUT
# Uses the torch that $PYTHON (python3) holds and downloads nothing. Under ten minutes. A stage that fails or
# takes too long does not stop the others; the exit status is 1 if one did.
set -euo pipefail
out=$(realpath -m "${1:?usage: bash bench/gpu.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TEARDOWN_CUPTI=0 DISABLE_CUPTI_LAZY_REINIT=1 # the profiler, opened again and again beside CUDA graphs

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "bench/gpu.sh needs a CUDA device, and torch in $python sees none" >&2; exit 1; }
mkdir -p "$out"

failed=()
# Interrupted at the limit, pytest still writes its record.
stage() { # name, seconds at most, command...; what it says is in $out/NAME.txt too
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.txt" || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

bench() { # name, seconds at most, shape, arguments of pytest...
    local name=$1 limit=$2 shape=$3
    shift 3
    stage "bench-$name" "$limit" "$python" -m pytest -m gpu --benchmark-only --shape "$shape" --dtype float16 \
        --benchmark-columns min,median,max,stddev --benchmark-json "$out/bench-$name.json" "$@"
}

# The CUDA backend for this GPU alone; without nvcc what is there already is used.
if command -v nvcc >/dev/null; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .)
    case $capability in 90 | 10?) capability+=a ;; esac
    export KVSPN_CUDA=1 KVSPN_CUDA_ARCHS=$capability
fi

stage build 240 "$python" -m pip install -q --no-index --no-build-isolation --no-deps -e .
stage machine 60 "$python" -m bench.machine

# Only the files that hold such tests, so that nothing else need be importable here.
mapfile -t tests < <(grep -l 'pytest.mark.gpu' tests/test_*.py)
stage tests 240 "$python" -m pytest -m gpu "${tests[@]}"

# Every backend and way to run a step, transformers eager and compiled; attention beside its peers.
bench step 240 whisperM2M bench/test_step.py -k "not peer"
bench step-peers 180 whisperM2M bench/test_step.py -k peer
bench attention 240 whisperM2M bench/test_attention_peers.py
bench ops 90 whisperM2M bench/test_ops.py
bench small 120 small bench/test_ops.py bench/test_step.py -k "not peer"
stage summary 60 "$python" -m bench.summary "$out"

# The package's own kernels; torch's are not ours to check.
if compgen -G 'kvspn/*cuda*.so' >/dev/null && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        stage "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -m pytest -m gpu -x tests/test_gpu_cuda.py -k "every_block and float16"
    done
fi

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
