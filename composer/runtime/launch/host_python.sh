#!/bin/sh
# The Python of a bundle that carries none: the host's CPython @MINOR@, seeing this bundle's distributions only.
self=$0
if [ -L "$self" ]; then
    self=$(realpath -- "$0" 2>/dev/null || readlink -f -- "$0") || exit 127
fi
case $self in
    */*) ;;
    *) self=./$self ;;
esac
prefix=$(CDPATH= cd -- "${self%/*}/.." >/dev/null && pwd) || exit 127

fits() {
    [ -x "$1" ] && "$1" -I -S -c "
import sys
sys.exit('%d.%d' % sys.version_info[:2] != '@MINOR@' or sys.implementation.name != 'cpython' or sys.abiflags != '')
" 2>/dev/null
}

IFS=:
set -f
for folder in ${PATH-} /usr/local/bin /usr/bin; do
    # This folder itself is on PATH after `activate`.
    if [ ! "$folder" -ef "${self%/*}" ] && fits "$folder/python@MINOR@"; then
        unset IFS PYTHONHOME
        export PYTHONNOUSERSITE=1
        # The folder holds a sitecustomize.py; children inherit it.
        export PYTHONPATH="$prefix/lib/python@MINOR@/_compose_host"
        exec "$folder/python@MINOR@" "$@"
    fi
done
echo "${self##*/}: this bundle needs a CPython @MINOR@ on the host (not a debug or free-threaded build); none is on PATH" >&2
exit 127
