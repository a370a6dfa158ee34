#!/bin/sh
# A bundle on a GPU host from its archive to its answers, as an operator would use it: doctor, server, service.
#
#     tests/gpu/host_proof.sh BUNDLE.tar.zst PREFIX RESULTS     (as root; PREFIX must not exist)
#
# Everything runs on a bare host (bare_host.sh), from a prefix that is not the one it was built in and that its user may
# not write to. With two GPUs the server also runs on both.
set -eu
bundle=$1 prefix=$2 results=$3 here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/bare_host.sh"

unpack "$bundle" "$prefix"
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)
echo "$gpus GPUs"
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
finish
