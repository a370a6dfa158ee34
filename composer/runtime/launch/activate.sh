# Source this file from sh, bash, zsh or dash:  . BUNDLE/bin/activate     Undo it with:  deactivate
# dash does not tell a file where it lies: set COMPOSE_PREFIX to the bundle's folder first.

if [ -n "${BASH_VERSION-}" ]; then
    _compose_file=$BASH_SOURCE
elif [ -n "${ZSH_VERSION-}" ]; then
    # Not ${(%):-%x}: in the C locale a prompt escape garbles what is not ASCII.
    _compose_file=${funcsourcetrace[1]%:*}
else
    _compose_file=${COMPOSE_PREFIX:+$COMPOSE_PREFIX/bin/activate}
fi
if [ -L "$_compose_file" ]; then
    _compose_file=$(realpath -- "$_compose_file" 2>/dev/null || readlink -f -- "$_compose_file")
fi
case $_compose_file in
    */*) ;;
    *) _compose_file=./$_compose_file ;;
esac
_compose_prefix=$(CDPATH= cd -- "${_compose_file%/*}/.." >/dev/null 2>&1 && pwd)

if [ ! -x "$_compose_prefix/bin/python3" ]; then
    echo "activate: cannot tell where the bundle is: set COMPOSE_PREFIX to its folder and source this again" >&2
    unset _compose_file _compose_prefix
    return 1
fi

if [ -n "${_COMPOSE_ACTIVE-}" ]; then
    deactivate
fi

deactivate() {
    PATH=$_COMPOSE_OLD_PATH
    export PATH
    if [ -n "${_COMPOSE_OLD_PS1+x}" ]; then
        PS1=$_COMPOSE_OLD_PS1
    fi
@RESTORE@
    unset COMPOSE_PREFIX _COMPOSE_ACTIVE _COMPOSE_OLD_PATH _COMPOSE_OLD_PS1
    unset -f deactivate
    hash -r 2>/dev/null || true
}

_COMPOSE_ACTIVE=1
_COMPOSE_OLD_PATH=${PATH-}
COMPOSE_PREFIX=$_compose_prefix
PATH=$COMPOSE_PREFIX/bin${PATH:+:$PATH}
export COMPOSE_PREFIX PATH
if [ -n "${PS1+x}" ]; then
    _COMPOSE_OLD_PS1=$PS1
    PS1="(@NAME@) $PS1"
fi
@SET@
unset _compose_file _compose_prefix
hash -r 2>/dev/null || true
