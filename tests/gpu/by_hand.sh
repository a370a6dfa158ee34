#!/bin/sh
# What a bundle's archive and its start cost beside the same tree packed and started by hand, in turns on one GPU host.
#
#     tests/gpu/by_hand.sh BUNDLE.tar.zst WORK [ROUNDS]      (WORK must not exist; it is removed at the end)
#
# By hand: `tar --zstd` at its default level of the unpacked bundle without what runs at the start of its interpreter,
# and `python -m sglang.launch_server`; the bundle's way is `bin/sglang-serve` with its preflight. One JSON line each.
set -eu
bundle=$1 work=$2 rounds=${3:-3} here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
mkdir "$work"
trap 'rm -rf "$work"' EXIT

now() { date +%s%N; }
unpack() {
    rm -rf "${work:?}/$1"
    mkdir "$work/$1"
    sync
    began=$(now)
    tar --zstd -xf "$2" -C "$work/$1"
    echo "{\"way\": \"$1\", \"untar_ms\": $((($(now) - began) / 1000000))}"
}
start() {
    printf '{"way": "%s", "start": ' "$1"
    (cd "$work" && "$work/$1/bin/python" "$here/check_server.py" "$work/$1" model --only-start --log "$1.log" $2)
    echo "}"
}

unpack bundle "$bundle"
"$work/bundle/bin/python" "$here/make_tiny_llama.py" "$work/model" > /dev/null
cp -a "$work/bundle" "$work/hand"
rm "$work"/hand/lib/python3.*/site-packages/*compose*.pth
tar --zstd -cf "$work/hand.tar.zst" -C "$work/hand" .
echo "{\"bundle_bytes\": $(stat -c %s "$bundle"), \"hand_bytes\": $(stat -c %s "$work/hand.tar.zst")}"
round=0
while [ "$round" -lt "$rounds" ]; do
    unpack bundle "$bundle"
    unpack hand "$work/hand.tar.zst"
    start bundle ""
    start hand --module
    round=$((round + 1))
done
