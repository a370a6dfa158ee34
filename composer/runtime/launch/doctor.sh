#!/bin/sh
# Tell what on this host keeps the bundle from serving: bin/compose-doctor --help. Where the bundle's own Python does not
# start, that is the first finding, and a Python 3.10 or newer of the host, if there is one, looks for the others.
self=$0
if [ -L "$self" ]; then
    self=$(realpath -- "$0" 2>/dev/null || readlink -f -- "$0") || exit 1
fi
case $self in
    */*) ;;
    *) self=./$self ;;
esac
prefix=$(CDPATH= cd -- "${self%/*}/.." >/dev/null && pwd) || exit 1
python=$prefix/bin/python3
code=
for folder in "$prefix"/lib/python3.*/site-packages/_compose; do
    code=$folder
done

# What would break, or stop, the interpreter is kept for the doctor to judge, and for nobody else.
for name in PYTHONPATH PYTHONHOME WHEEL_COMPOSER_HOST_CHECK WHEEL_COMPOSER_GPU_CHECK; do
    unset "_COMPOSE_WAS_$name"
    eval "if [ -n \"\${$name+x}\" ]; then export _COMPOSE_WAS_$name=\"\$$name\"; unset $name; fi"
done
unset _COMPOSE_START_FAULT
export WHEEL_COMPOSER_HOST_CHECK=off WHEEL_COMPOSER_GPU_CHECK=off

# What floors of the bundle say, by name.
floor() {
    sed -n "s/^$1	\([^	]*\)	.*/\1/p" "$prefix/share/compose/floors" 2>/dev/null
}

# Sets `why` bin/python3 does not start and a `fix`. $1: what it said; $2: its exit status.
explain() {
    why=$(printf '%s' "$1" | tr '\t\n' '  ' | tail -c 400)
    fix="Unpack the bundle again, and compare it with its .sha256 first."
    if [ ! -e "$python" ]; then
        why="it is not there, or a link to nothing"
        return
    elif [ ! -x "$python" ]; then
        why="it may not be run: mounted noexec, or its execute permission is lost"
        fix="Mount $prefix without noexec; or unpack the bundle again: copies by way of FAT, SMB or object storage lose permissions."
        return
    fi
    case $2 in
        132) why="the CPU does not know an instruction of it (SIGILL)"
            fix="Use a bundle for an instruction set (--isa) that this CPU has." ;;
        135 | 139) why="it is damaged, or this host's C library is: it ends with signal $(($2 - 128))" ;;
    esac
    case $why in
        *"version \`GLIBC_"*) why="this host has $(getconf GNU_LIBC_VERSION 2>/dev/null || echo 'another glibc'): $why"
            fix="Use a host with glibc $(floor glibc) or newer." ;;
        *"no Python of its own"*) fix="Install such a CPython, or set WHEEL_COMPOSER_PYTHON to the path of one." ;;
        *"cannot open shared object file"*) fix="Unpack the bundle again if that library is its own, or install it." ;;
        *"not found"* | *"No such file"*) why="this host lacks the loader of glibc: $why"
            fix="Use a host, or a container image, with glibc $(floor glibc) or newer." ;;
        "") why="it ends with status $2" ;;
    esac
}

# Without a Python at all. $@: the doctor's options.
report() {
    name=$(sed -n '1p' "$prefix/share/compose/floors" 2>/dev/null)
    name=${name:-${prefix##*/}}
    for word in "$@"; do
        if [ "$word" = --json ]; then
            for value in "$name" "$prefix" "$why" "$fix"; do
                printf '%s' "$value" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g; s/.*/"&"/'
                echo
            done | tr -s '\n' | {
                IFS= read -r name && IFS= read -r prefix && IFS= read -r why && IFS= read -r fix
                printf '{"schema": 1, "bundle": %s, "prefix": %s, "tests": [], "checked": ["python"], ' "$name" "$prefix"
                printf '"findings": [{"id": "python.start", "severity": "error", "subject": "bin/python3", '
                printf '"evidence": %s, "fix": %s}]}\n' "$why" "$fix"
            }
            return
        fi
    done
    printf '%s\n' "$name in $prefix" "error: python.start: bin/python3: $why" "  fix: $fix"
    echo "not ready: 1 error; this host has no Python 3.10 or newer to look for others"
}

ours='import sys; sys.path = [one for one in sys.path if one]; from _compose.doctor.cli import main'
# Of the bundle's site-packages only our own package: the others are for another Python.
theirs='
import importlib.util as tools, sys
folder = sys.argv.pop(1)
if sys.version_info < (3, 10):
    sys.exit(1)
spec = tools.spec_from_file_location("_compose", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["_compose"] = tools.module_from_spec(spec)
spec.loader.exec_module(sys.modules["_compose"])
from _compose.doctor.cli import main'

machine=$(sed -n 's/.*"machine" *: *"\([^"]*\)".*/\1/p' "$prefix/share/compose/target.json" 2>/dev/null)
if [ -n "$machine" ] && [ "$machine" != "$(uname -m)" ]; then
    why="it is for $machine, and this host is $(uname -m)"
    fix="Use a bundle for $(uname -m)."
elif { said=$(LC_ALL=C; export LC_ALL; "$python" -s -B -c "$ours" 2>&1 </dev/null); } 2>/dev/null; then  # sh reports signals
    exec "$python" -s -B -c "$ours; sys.exit(main())" "$@"
else
    explain "$said" "$?"
fi

_COMPOSE_START_FAULT="$why	$fix"
export _COMPOSE_START_FAULT
for minor in "" .15 .14 .13 .12 .11 .10; do
    if [ -n "$code" ] && "python3$minor" -I -S -B -c "$theirs" "$code" </dev/null >/dev/null 2>&1; then
        exec "python3$minor" -I -S -B -c "$theirs; sys.exit(main())" "$code" "$@"
    fi
done
report "$@"
exit 1
