#!/bin/sh
# A bundle on a GPU host from its archive to its answers, as an operator would use it: doctor, server, service.
#
#     tests/gpu/host_proof.sh BUNDLE.tar.zst PREFIX RESULTS     (as root; PREFIX must not exist)
#
# Everything runs as a user without a passwd entry, with an empty PATH and a fresh home, from a prefix that is not the
# one it was built in and that this user may not write to. A host toolkit is moved out of sight until the end. With two
# GPUs the server also runs on both.
set -eu
bundle=$1 prefix=$2 results=$3 here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
work=$(mktemp -d)
mkdir -p "$results" "$work/home" "$work/tests"
cp "$here"/*.py "$here"/*.sh "$work/tests"

hide() { for each in /usr/local/cuda*; do [ -e "$each" ] && mv "$each" "$each.$1"; done; true; }
restore() { for each in /usr/local/cuda*.hidden; do [ -e "$each" ] && mv "$each" "${each%.hidden}"; done; true; }
trap restore EXIT
hide hidden

now() { date +%s%N; }
began=$(now)
mkdir -p "$prefix"
tar --zstd -xf "$bundle" -C "$prefix"
untarred=$(now)
chmod -R a-w "$prefix"
chown -R 12345:12345 "$work"
chmod 755 "$work"

stranger() {
    (cd "$work" && exec setpriv --reuid 12345 --regid 12345 --clear-groups --no-new-privs \
        env -i HOME="$work/home" PATH=/nonexistent "$@")
}
failed=0
step() {
    name=$1 && shift
    echo "== $name"
    stranger "$@" > "$results/$name.txt" 2>&1 || failed=$((failed + 1))
    tail -n 30 "$results/$name.txt"
}
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
echo "untar: $(((untarred - began) / 1000000)) ms; $gpus GPUs"
stranger "$prefix/bin/python" tests/make_tiny_llama.py model
# The very first start of a bundle that was unpacked a moment ago.
step server "$prefix/bin/python" tests/check_server.py "$prefix" model --log server.log --answers answers
step server-again "$prefix/bin/python" tests/check_server.py "$prefix" model --log again.log --answers answers
step server-module "$prefix/bin/python" tests/check_server.py "$prefix" model --log module.log --answers answers --module
if [ "$gpus" -gt 1 ]; then
    step server-tp2 "$prefix/bin/python" tests/check_server.py "$prefix" model --log tp2.log --tp 2
fi
step detect "$prefix/bin/compose-detect"
step doctor /usr/bin/env PATH=/usr/bin:/bin sh tests/doctor.sh "$prefix"
step doctor-deep "$prefix/bin/compose-doctor" --deep --imports --model model
step service /usr/bin/env PATH=/usr/bin:/bin sh tests/service.sh "$prefix" model
cp "$work"/*.log "$results" 2>/dev/null || true
echo "$failed steps failed"
exit "$failed"
