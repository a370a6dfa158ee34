#!/bin/sh
# Unpack an unmodified bundle (--slim none) and make from it the trees that slim_proof.sh compares.
#
#     tests/gpu/slim_trees.sh UNMODIFIED.tar.zst CASE TREES    (TREES must not exist)
#
# CASE is what pack_case.py wrote: manifests by the names of the trees. Every file is compared with its manifest's digest.
set -eu
bundle=$1 case=$2 trees=$3 here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
mkdir -p "$trees/none"
tar --zstd -xf "$bundle" -C "$trees/none"
for manifest in "$case"/*.json; do
    name=$(basename "$manifest" .json)
    env -i HOME=/nonexistent "$trees/none/bin/python" "$here/make_tree.py" "$trees/none" "$trees/$name" "$manifest" \
        "$case/files"
done
