#!/usr/bin/env bash
# Tests and records of a machine with a CUDA GPU: bash bench/gpu.sh OUT
# Uses the torch that $PYTHON (python3) holds and downloads nothing. Under ten minutes.
set -euo pipefail
out=$(realpath -m "${1:?usage: bash bench/gpu.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "bench/gpu.sh needs a CUDA device, and torch in $python sees none" >&2; exit 1; }
mkdir -p "$out"

# The CUDA backend for this GPU alone; without nvcc what is there already is used.
if command -v nvcc >/dev/null; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .)
    case $capability in 90 | 10?) capability+=a ;; esac
    export KVSPN_CUDA=1 KVSPN_CUDA_ARCHS=$capability
fi

echo "== build"
"$python" -m pip install -q --no-index --no-build-isolation --no-deps -e .

echo "== machine"
"$python" -m bench.machine | tee "$out/machine.json"

# Only the files that hold such tests, so that nothing else need be importable here.
mapfile -t tests < <(grep -l 'pytest.mark.gpu' tests/test_*.py)
echo "== tests"
"$python" -m pytest -m gpu "${tests[@]}" | tee "$out/tests.txt"

# The package's own kernels; torch's are not ours to check.
if compgen -G 'kvspn/*cuda*.so' >/dev/null && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -m pytest -m gpu -x tests/test_gpu_cuda.py -k "every_block and float16" | tee "$out/$tool.txt"
    done
fi

for shape in small whisperM2M; do
    echo "== bench, $shape"
    "$python" -m pytest -m gpu --benchmark-only --shape "$shape" --dtype float16 \
        --benchmark-columns min,median,max,stddev --benchmark-json "$out/bench-$shape.json" bench
done
