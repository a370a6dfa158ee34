#!/bin/sh
# Carry a bundle to a host that takes only small files: cut it here, put it together there, whole or not at all.
#
#     tests/gpu/parts.sh split BUNDLE FOLDER [MIB]    FOLDER/part-000 ..., 60 MiB each, and FOLDER/parts.sha256
#     tests/gpu/parts.sh join FOLDER BUNDLE           checks every part and the whole; BUNDLE.sha256, too
#
# sh, coreutils and nothing else.
set -eu
usage() { sed -n 's/^# \{0,1\}//; 2,7p' "$0" >&2 && exit 2; }

split_bundle() {
    bundle=$1 folder=$2
    mkdir -p "$folder"
    split -b "${3:-60}m" -d -a 3 "$bundle" "$folder/part-"
    (cd "$folder" && sha256sum part-* > parts.sha256)
    echo "$(sha256sum < "$bundle" | cut -d ' ' -f 1)  $(basename "$bundle")" > "$folder/whole.sha256"
}

join_parts() {
    folder=$1 bundle=$2
    (cd "$folder" && sha256sum --quiet -c parts.sha256)
    cat "$folder"/part-* > "$bundle.joining"
    read -r digest name < "$folder/whole.sha256"
    echo "$digest  $bundle.joining" | sha256sum --quiet -c -
    mv "$bundle.joining" "$bundle"
    echo "$digest  $(basename "$bundle")" > "$bundle.sha256"
}

case ${1-} in
    split) [ $# -ge 3 ] || usage; shift; split_bundle "$@" ;;
    join) [ $# -eq 3 ] || usage; shift; join_parts "$@" ;;
    *) usage ;;
esac
