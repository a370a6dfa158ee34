#!/bin/sh
# The proof on a GPU host: unpack a bundle, then use it as a stranger would on a bare, airgapped machine.
#
#     tests/gpu/proof.sh BUNDLE.tar.zst PREFIX RESULTS     (as root; PREFIX must not exist)
#
# The prefix belongs to root and is read-only; everything runs as an unprivileged user without a passwd entry, with an
# empty PATH and a fresh home. /usr/local/cuda* is moved out of sight until the end: a bare host has no toolkit.
set -eu
bundle=$1 prefix=$2 results=$3 here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
work=$(mktemp -d)
mkdir -p "$results" "$work/home" "$work/tests"
cp "$here"/*.py "$work/tests"

hide() { for each in /usr/local/cuda*; do [ -e "$each" ] && mv "$each" "$each.$1"; done; true; }
restore() { for each in /usr/local/cuda*.hidden; do [ -e "$each" ] && mv "$each" "${each%.hidden}"; done; true; }
trap restore EXIT
hide hidden

(cd "$(dirname "$bundle")" && sha256sum -c "$(basename "$bundle").sha256")
mkdir -p "$prefix"
time tar --zstd -xf "$bundle" -C "$prefix"
chmod -R a-w "$prefix"
chown -R 12345:12345 "$work"
chmod 755 "$work"

stranger() {
    (cd "$work" && exec setpriv --reuid 12345 --regid 12345 --clear-groups --no-new-privs \
        env -i HOME="$work/home" PATH=/nonexistent "$@")
}
# Every step runs, whatever becomes of the one before; the last line counts the failures.
failed=0
step() {
    name=$1 && shift
    echo "== $name"
    stranger "$@" > "$results/$name.txt" 2>&1 || failed=$((failed + 1))
    tail -n 25 "$results/$name.txt"
}
{
    nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader
    ldd --version | head -n 1
    uname -sr
    for tool in gcc cc g++ nvcc ninja ld; do stranger /bin/sh -c "command -v $tool" || echo "no $tool"; done
} > "$results/host.txt" 2>&1
cat "$results/host.txt"
python=$prefix/bin/python
step model "$python" tests/make_tiny_llama.py model
step kernels "$python" tests/check_kernels.py
step server "$python" tests/check_server.py "$prefix" model --log server.log
step server-triton "$python" tests/check_server.py "$prefix" model --log triton.log -- --attention-backend triton
step server-fp8 "$python" tests/check_server.py "$prefix" model --log fp8.log -- --quantization fp8
cp "$work"/*.log "$results" 2>/dev/null || true
# Once more from another place, with a space and a letter that is not ASCII in its path.
moved=$(dirname "$prefix")/"möved to"
mkdir "$moved"
mv "$prefix" "$moved/bundle"
step moved "$moved/bundle/bin/python" tests/check_kernels.py
echo "$failed steps failed"
exit "$failed"
