#!/bin/sh
# The proof of slimming on a GPU host: slimmed libraries compute what the unmodified ones compute.
#
#     tests/gpu/slim_proof.sh TREES RESULTS [SECONDS]
#
# TREES holds unpacked bundles: `none` with the unmodified libraries, and any of `free`, `all` and `lean`, as of
# slim_trees.sh. Everything runs side by side, each with at most SECONDS (120). The last line counts the failures.
set -u
trees=$1 results=$2 limit=${3:-120} here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
work=$(mktemp -d)
mkdir -p "$results" "$work/home"
failed=0
verdict() { if [ "$1" = 0 ]; then echo "ok: $2"; else echo "FAILED ($1): $2" && failed=$((failed + 1)); fi; }
bare() { env -i HOME="$work/home" PATH=/nonexistent TORCHINDUCTOR_COMPILE_THREADS=1 "$@"; }
port=29600
started=""
start() {
    name=$1 && shift
    port=$((port + 1))
    (cd "$work" && timeout -k 5 "$limit" env -i HOME="$work/home" PATH=/nonexistent TORCHINDUCTOR_COMPILE_THREADS=1 \
        MASTER_PORT=$port "$@" > "$results/$name.txt" 2> "$results/$name.err"; echo $? > "$work/$name.rc") &
    started="$started $name"
}

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader
bare "$trees/none/bin/python" "$here/make_tiny_llama.py" "$work/model" > "$results/model.txt" 2>&1
verdict $? "a model to serve"
for tree in none free all; do
    [ -d "$trees/$tree" ] || continue
    start "lazy-$tree" CUDA_MODULE_LOADING=LAZY "$trees/$tree/bin/python" "$here/fingerprint.py"
    start "eager-$tree" CUDA_MODULE_LOADING=EAGER "$trees/$tree/bin/python" "$here/fingerprint.py"
    start "sparse-$tree" "$trees/$tree/bin/python" "$here/fingerprint.py" semi_structured
done
for tree in free all lean; do
    [ -d "$trees/$tree" ] || continue
    start "kernels-$tree" "$trees/$tree/bin/python" "$here/check_kernels.py"
    start "server-$tree" "$trees/$tree/bin/python" "$here/check_server.py" "$trees/$tree" "$work/model" \
        --port $((port + 100)) --log "$results/server-$tree.log" -- --mem-fraction-static 0.2
done
[ ! -d "$trees/lean" ] || start stubs-lean "$trees/lean/bin/python" "$here/check_stubs.py"

# A bundle for another GPU: refused by its own check, and what CUDA says without that.
foreign=$trees/foreign slimmed=$(ls -d "$trees/free" "$trees/all" 2>/dev/null | head -n 1)
library=$(cd "$slimmed" && ls lib/python3.*/site-packages/torch/lib/libtorch_cuda.so)
cp -al "$slimmed" "$foreign"
rm "$foreign/share/compose/target.json" "$foreign/$library"
sed 's/"sm":\[[0-9]*\]/"sm":[120]/' "$slimmed/share/compose/target.json" > "$foreign/share/compose/target.json"
bare "$foreign/bin/python" -c "import torch; print('torch was imported')" > "$results/foreign.txt" 2>&1
code=$?
cat "$results/foreign.txt"
[ $code = 10 ]
verdict $? "a bundle for SM 120 is refused before torch is imported (exit status $code)"
bare COMPOSE_PREFIX="$trees/none" PYTHONPATH="$here/../.." "$trees/none/bin/python" -c "
import mmap, sys
from composer.formats.slim import slim
from composer.model.gpu import Selection
with open(sys.argv[1], 'rb') as handle:
    before = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
with open(sys.argv[2], 'wb') as out:
    out.writelines(slim(before, 'libtorch_cuda.so', Selection(sms=(120,)), debug=True).pieces())
" "$trees/none/$library" "$foreign/$library"
verdict $? "libtorch_cuda slimmed for SM 120"
echo "what CUDA says without our check:"
bare WHEEL_COMPOSER_GPU_CHECK=off "$foreign/bin/python" -c "import torch; print(torch.ones(3, device='cuda') * 2)" 2>&1 |
    tee "$results/foreign-unchecked.txt" | grep Error

wait
for name in $started; do
    verdict "$(cat "$work/$name.rc")" "$name: $(grep -c '"ok": true\|"sha256"' "$results/$name.txt") results"
done
for mode in lazy eager sparse; do
    others=$(ls "$results/$mode-free.txt" "$results/$mode-all.txt" 2>/dev/null)
    # shellcheck disable=SC2086  (names without spaces)
    bare "$trees/none/bin/python" "$here/compare.py" "$results/$mode-none.txt" $others > "$results/compare-$mode.txt"
    verdict $? "$mode: the slimmed stacks compute the same"
    cat "$results/compare-$mode.txt"
done
echo "$failed steps failed"
exit "$failed"
