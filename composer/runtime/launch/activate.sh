# Source this file from sh, bash, zsh or dash:  . BUNDLE/bin/activate     Undo it with:  deactivate
# Where a shell does not tell where a sourced file lies, and there is no /proc: set COMPOSE_PREFIX to the bundle's
# folder first.

if [ -n "${BASH_VERSION-}" ]; then
    _compose_file=$BASH_SOURCE
elif [ -n "${ZSH_VERSION-}" ]; then
    # Not ${(%):-%x}: in the C locale a prompt escape garbles what is not ASCII. As sh or ksh, zsh does not load the
    # module by itself, and counts from 0.
    zmodload zsh/parameter
    _compose_file="${funcsourcetrace[@]:0:1}"
    _compose_file=${_compose_file%:*}
else
    # dash and busybox read a sourced file through a descriptor of 10 or more. $$ is not the process of a subshell.
    _compose_file=${COMPOSE_PREFIX:+$COMPOSE_PREFIX/bin/activate}
    if read -r _compose_process _compose_rest 2>/dev/null </proc/self/stat; then
        for _compose_open in "/proc/$_compose_process/fd"/[1-9][0-9]*; do
            _compose_rest=$(readlink -- "$_compose_open" 2>/dev/null || :)
            case $_compose_rest in
                */bin/activate)
                    [ ! -d "${_compose_rest%/bin/activate}/@SITE@/_compose" ] || _compose_file=$_compose_rest ;;
            esac
        done
    fi
    unset _compose_process _compose_rest _compose_open
fi
if [ -L "$_compose_file" ]; then
    _compose_file=$(realpath -- "$_compose_file" 2>/dev/null || readlink -f -- "$_compose_file")
fi
case $_compose_file in
    */*) ;;
    *) _compose_file=./$_compose_file ;;
esac
_compose_prefix=$(CDPATH= cd -- "${_compose_file%/*}/.." >/dev/null 2>&1 && pwd) || _compose_prefix=
if [ ! -x "$_compose_prefix/bin/python3" ]; then
    echo "activate: cannot tell where the bundle is: set COMPOSE_PREFIX to its folder and source this again" >&2
    unset _compose_file _compose_prefix
    return 1
fi

if [ ! -r "$_compose_prefix/etc/env" ]; then
    echo "activate: $_compose_prefix/etc/env cannot be read: unpack the bundle again" >&2
    unset _compose_file _compose_prefix
    return 1
fi

# Another bundle's, this one's from before, or that of a virtual environment.
if [ "$(command -v deactivate || :)" = deactivate ]; then
    deactivate
fi

_compose_text=$("$_compose_prefix/bin/python3" -I -S -B -c '@ENTER@' "$_compose_prefix/@SITE@" sh) || _compose_text=
if [ -z "$_compose_text" ]; then
    echo "activate: $_compose_prefix/bin/python3 does not run on this host" >&2
    unset _compose_file _compose_prefix _compose_text
    return 1
fi
eval "$_compose_text"
if [ -n "${PS1+x}" ]; then
    _COMPOSE_OLD_PS1=$PS1
    PS1="(@NAME@) $PS1"
fi

deactivate() {
    _compose_restore
    if [ -n "${_COMPOSE_OLD_PS1+x}" ]; then
        PS1=$_COMPOSE_OLD_PS1
        unset _COMPOSE_OLD_PS1
    fi
    unset -f _compose_restore deactivate
    hash -r 2>/dev/null || :
}

unset _compose_file _compose_prefix _compose_text
hash -r 2>/dev/null || :
