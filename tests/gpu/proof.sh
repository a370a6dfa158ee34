#!/bin/sh
# The proof on a GPU host: unpack a bundle, then use it as a stranger would on a bare, airgapped machine.
#
#     tests/gpu/proof.sh BUNDLE.tar.zst PREFIX RESULTS     (as root; PREFIX must not exist)
#
# Everything runs as a stranger on a bare host (bare_host.sh), from a prefix that it may not write to.
set -eu
bundle=$1 prefix=$2 results=$3 here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/bare_host.sh"

(cd "$(dirname "$bundle")" && sha256sum -c "$(basename "$bundle").sha256")
unpack "$bundle" "$prefix"
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
# Once more from another place, with a space and a letter that is not ASCII in its path.
moved=$(dirname "$prefix")/"möved to"
mkdir "$moved"
mv "$prefix" "$moved/bundle"
step moved "$moved/bundle/bin/python" tests/check_kernels.py
finish
