#!/usr/bin/env bash
# On a machine with a GPU, from a source tree: everything worth having of eight minutes, the most valuable first.
#
#     benchmarks/on_gpu.sh FOLDER
#     DEVICE=cpu benchmarks/on_gpu.sh FOLDER     # a rehearsal: tiny shapes, Triton's interpreter; times mean nothing
#
# PYTHON names the interpreter. README.md beside this file says what it needs, and how that gets to a machine without a
# network. Where CONFORMANCE names the contract's checks they run too, last. A phase that fails or runs out of its time
# leaves the others: each writes its file as it goes, FOLDER/phases.txt says how each ended, failed.txt what has failed.
#
# The budget, in seconds, 470 in all, of which 70 are starts of processes (10 at about 7 s, imports and first context):
#    60  what no GPU has run: 105 whole calls, 190 tests of kernels by -n 12, most of it compilation, 90 kernels of 3 s
#    30  whole calls: 70 tests by -n 12; beside both torch.compile makes what the steps need, which is kept on the disk
#    25  trainers, the command, models: 14 tests by -n 4, of 2 s each after 10 s of imports
#    30  host: 12 rows of 200 calls of 2 to 5 ms, a fourth of that at 8192 tokens
#    30  products: 3 hidden sizes x 28 products x 11 rounds of 0.3 to 8 ms, 4 s, and their buffers
#    60  linear kernel: 3 x 30 calls x 11 rounds of 0.2 to 20 ms, 5 s; compiling 9 variants, 5 s each
#    50  jobs of one and two models beside quack, Liger, orda: 41 rows of 1.1 s; their own compilation is the unknown
#   115  steps: 94 rows of 1.0 s (0.3 s of warm-up, 3 to 41 rounds of floor and step) and floors of 27 shapes, 2 s each
#    50  pieces of steps: 3 x 7 calls x 11 rounds of 4 to 98 ms, 12 s; rows shared by programs, 6 groups of 1 s,
#        compiled beside the tests; 36 row kernels, half of them compiled by the tests
#    20  linear kernel, tiles that no default has: the last of what is timed, since they may hang
# and what is left of 470 for the remaining tests. LIMIT changes the 470.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh FOLDER}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || { echo "$out is not empty: choose a new or an empty folder" >&2; exit 2; }
"$python" -c 'import torch, triton, numpy, typer, rich, pytest, xdist, pytest_benchmark, hypothesis' || exit 2
if [ "$device" = cpu ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    slower=12 workers=2 few=2 run_suite=quick peers_suite=quick steps=(--jobs nll,hidden-full)
else
    "$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"' || exit 2
    slower=1 workers=12 few=4 run_suite=run peers_suite=peers steps=()
fi
limit=$((${LIMIT:-470} * slower))

# phase NAME SECONDS COMMAND...: run a command for at most so long, and not past the limit of all
phase() {
    local name=$1 seconds=$(($2 * slower)) start=$SECONDS code=0
    shift 2
    seconds=$((seconds < limit - SECONDS ? seconds : limit - SECONDS))
    [ "$seconds" -gt 5 ] || { echo "$name: no time left" | tee -a "$out/phases.txt"; return; }
    timeout --kill-after=5 "$seconds" "$@" > "$out/$name.log" 2>&1 || code=$?
    echo "$name: ended with $code after $((SECONDS - start)) of $seconds s" | tee -a "$out/phases.txt"
}
# tests WORKERS: one test at a time is given to a worker, in the order of the files. On a CPU by PyTorch's operations:
# make test has the kernels interpreted
tests() {
    echo env -u TRITON_INTERPRET "$python" -m pytest -v --tb=short -n "$1" --maxschedchunk=1 -p no:cacheprovider
}
bench() {
    echo "$python" -m benchmarks --device "$device"
}

# shellcheck disable=SC2046  # the functions print words
if [ "$device" = cuda ]; then
    # what the compilers make is kept on the disk: made beside the tests, it takes the steps no time
    TORCHINDUCTOR_COMPILE_THREADS=4 timeout 110 "$python" -m benchmarks.warm --device cuda --suites run,peers \
        --providers compile,quack,quack-lse,orda > "$out/compiled.log" 2>&1 &
    timeout 85 "$python" -m benchmarks.kernels --json "$out/beside-tests.json" --parts segments \
        > "$out/beside-tests.log" 2>&1 &
fi
rows=(tests/rowops/test_policy.py tests/rowops/test_losses.py tests/rowops/test_triton.py tests/rowops/test_segments.py)
phase untried 60 $(tests $workers) -m "untried and not interpreter" tests/core/test_gpu.py "${rows[@]}"
phase calls 30 $(tests $workers) -m "not untried" tests/core/test_gpu.py
phase trainers 25 $(tests $few) -m untried tests/integrations/test_devices.py
wait
phase host 30 "$python" -m benchmarks.host --device "$device" --json "$out/host.json" --limit $((22 * slower))
phase products 30 "$python" -m benchmarks.kernels --device "$device" --json "$out/products.json" --parts products \
    --limit $((24 * slower))
phase linear 60 "$python" -m benchmarks.kernels --device "$device" --json "$out/linear.json" --parts linear \
    --limit $((50 * slower))
ours=floor,fused-triton,fused-triton-low-chunks,fused-triton-one-pass,fused-triton-one-pass-stored,fused-native
theirs=quack,quack-lse,liger-flce-sm90,liger-scaled-ce,liger-flce-long,orda,unsloth-jsd
phase peers 50 $(bench) --suite "$peers_suite" "${steps[@]}" --providers "$ours,$theirs" --seconds 0.03 \
    --limit $((40 * slower)) --json "$out/peers.json"
phase steps 115 $(bench) --suite "$run_suite" "${steps[@]}" --no-memory --no-accuracy --limit $((103 * slower)) \
    --json "$out/steps.json"
phase pieces 50 "$python" -m benchmarks.kernels --device "$device" --json "$out/pieces.json" \
    --parts steps,segments,rows --limit $((40 * slower))
phase explicit 20 "$python" -m benchmarks.kernels --device "$device" --json "$out/explicit.json" --parts explicit \
    --limit $((15 * slower))
phase kernels "$limit" $(tests $workers) -m "not untried and not interpreter" "${rows[@]}" \
    tests/core/test_pytorch_compat.py
if [ -n "${CONFORMANCE:-}" ]; then
    export CONFORMANCE_DEVICE=$device CONFORMANCE_BACKENDS=triton,torch
    phase conformance "$limit" $(tests $workers) "$CONFORMANCE"
fi
for name in peers steps; do
    [ ! -f "$out/$name.json" ] || "$python" -m benchmarks.report "$out/$name.json" > "$out/$name.md"
done
grep -hE "^(FAILED|ERROR) |ended with [1-9]" "$out"/*.log "$out/phases.txt" > "$out/failed.txt"
cat "$out/failed.txt"
