#!/bin/sh
# The Python of a bundle that carries none: a CPython @MINOR@ of the host, started as if it lay in this folder.
# WHEEL_COMPOSER_PYTHON names one; otherwise the first that fits is taken from PATH, /usr/local/bin and /usr/bin.
self=$0
if [ -L "$self" ]; then
    self=$(realpath -- "$0" 2>/dev/null || readlink -f -- "$0") || exit 127
fi
case $self in
    */*) ;;
    *) self=./$self ;;
esac
prefix=$(CDPATH= cd -- "${self%/*}/.." >/dev/null && pwd) || exit 127

# Tried by a launcher, which found this one on PATH (after `activate`): a bundle without a Python is nobody's host.
if [ -n "${_COMPOSE_PROBE-}" ]; then
    exit 127
fi

# Free-threaded and debug builds load other extension modules, a CPython for musl none of the bundle's.
fits() {
    [ -f "$1" ] && [ -x "$1" ] && _COMPOSE_PROBE=1 "$1" -I -S -c "
import _ctypes, sys
odd = sys.implementation.name != 'cpython' or sys.abiflags or 'musl' in getattr(sys.implementation, '_multiarch', '')
sys.exit('%d.%d' % sys.version_info[:2] != '@MINOR@' or bool(odd))
" </dev/null >/dev/null 2>&1
}

# CPython believes argv[0] about where it lies, and the pyvenv.cfg there makes this folder its prefix: what a virtual
# environment does with a link to one fixed host. sh cannot set argv[0], Python can. PYTHONHOME tells a CPython that was
# moved after it was built where its standard library is; _compose_host.py takes it back before any child inherits it.
start() {
    program=$1
    shift
    exec "$program" -I -S -c "
import os, sys
os.environ['PYTHONHOME'] = ':'.join(dict.fromkeys([sys.base_prefix, sys.base_exec_prefix]))
os.execv(sys.executable, sys.argv[1:])
" "$prefix/bin/python@MINOR@" "$@"
}

if [ -n "${WHEEL_COMPOSER_PYTHON-}" ]; then
    looked="at WHEEL_COMPOSER_PYTHON=$WHEEL_COMPOSER_PYTHON"
    if fits "$WHEEL_COMPOSER_PYTHON"; then
        start "$WHEEL_COMPOSER_PYTHON" "$@"
    fi
else
    looked="for python@MINOR@ in ${PATH:+$PATH:}/usr/local/bin:/usr/bin"
    IFS=:
    set -f
    for folder in ${PATH-} /usr/local/bin /usr/bin; do
        if fits "$folder/python@MINOR@"; then
            unset IFS
            start "$folder/python@MINOR@" "$@"
        fi
    done
fi
echo "${self##*/}: this bundle has no Python of its own and needs a CPython @MINOR@ of the host, for glibc, with ctypes, neither debug nor free-threaded; looked $looked; set WHEEL_COMPOSER_PYTHON to the path of one" >&2
exit 127
