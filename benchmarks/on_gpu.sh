#!/usr/bin/env bash
# On a machine with a GPU, from a source tree: correctness, then the GPU suite.
#
#     benchmarks/on_gpu.sh FOLDER
#
# writes FOLDER/tests.log, conformance.log, compiled.log, gpu.json and gpu.png. PYTHON names the interpreter, which needs PyTorch,
# Triton, numpy, typer, rich, pytest, pytest-xdist, pytest-benchmark, hypothesis, and the peers that are to stand in the
# table. Where CONFORMANCE names the contract's checks they run too. Where something is wrong nothing is timed. LIMIT is
# how many seconds the timing may take (default 420): its file has each row as soon as it is measured.
set -euo pipefail
out=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh FOLDER}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || { echo "$out is not empty: choose a new or an empty folder" >&2; exit 2; }
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"'
# what torch.compile makes for the peers is kept on the disk: made beside the tests, it takes the suite no time
compiled=(--providers compile,compile-chunked,cce-compile --seconds 0 --no-memory --no-accuracy)
"$python" -m benchmarks --device cuda --suite gpu "${compiled[@]}" > "$out/compiled.log" 2>&1 &
"$python" -m pytest -q -n 8 -p no:cacheprovider -k "not interpreted" \
    tests/rowops/test_triton.py tests/core/test_gpu.py tests/core/test_pytorch_compat.py 2>&1 | tee "$out/tests.log"
if [ -n "${CONFORMANCE:-}" ]; then
    CONFORMANCE_DEVICE=cuda CONFORMANCE_BACKENDS=triton,torch \
        "$python" -m pytest -q -n 8 -p no:cacheprovider "$CONFORMANCE" 2>&1 | tee "$out/conformance.log"
fi
wait
"$python" -m benchmarks --device cuda --suite gpu --limit "${LIMIT:-420}" --json "$out/gpu.json"
"$python" -m benchmarks.report "$out/gpu.json" --plot "$out/gpu.png" > "$out/gpu.md"
